import math

import numpy as np
import pytest

from jfed import run


def made_up(accuracy):
    settings = [{"learning_rate": 0.1 * i} for i in range(len(accuracy))]
    return run.Sweep(settings, np.array([4]), {"accuracy": np.asarray(accuracy)[:, :, None]}, (), 1)


def test_the_table_has_the_mean_and_sample_deviation_of_each_setting():
    values = [[0.1, 0.3], [0.7, 0.8], [0.2, 0.2]]
    lines = run.sweep_table(made_up(values), "accuracy").splitlines()[3:]
    for line, row, setting in zip(lines, values, ("0", "0.1", "0.2"), strict=True):
        mean = sum(row) / 2
        deviation = math.sqrt(sum((v - mean) ** 2 for v in row))  # divided by n - 1 = 1
        assert line.split()[:3] == [setting, f"{mean:.4g}", f"{deviation:.4g}"]
    assert [line.endswith("*") for line in lines] == [False, True, False]


def test_the_star_follows_the_order_asked_for():
    table = run.sweep_table(made_up([[0.3, 0.1], [0.7, 0.8], [0.1, 0.2]]), "accuracy", order=min)
    assert [line.endswith("*") for line in table.splitlines()[3:]] == [False, False, True]


def test_one_seed_has_no_deviation():
    assert "std" not in run.sweep_table(made_up([[0.1], [0.2]]), "accuracy")


def curves(*settings):
    """A sweep of settings 0, 1, ... judged in rounds 10 and 20; each is given as the curves of its seeds."""
    found = {"accuracy": np.array(settings, float), "seconds": np.broadcast_to([3.0, 4.0], np.shape(settings))}
    return run.Sweep([{"mu": float(i)} for i in range(len(settings))], np.array([10, 20]), found, (), 1)


def test_the_quickest_setting_is_that_of_most_seeds_then_of_fewest_rounds():
    once_soon = [[0.9, 0.9], [0.1, 0.1]]  # one seed at once, the other never
    both_late = [[0.1, 0.9], [0.5, 0.9]]
    both_sooner = [[0.5, 0.9], [0.7, 0.9]]
    found = run.quickest_setting(curves(once_soon, both_late, both_sooner), "accuracy", 0.7)
    assert (found.setting, found.index) == ({"mu": 2.0}, 2)
    assert found.reached == [pytest.approx(15.0), 10.0]
    found = run.quickest_setting(curves(once_soon, both_late), "accuracy", 0.7)
    assert found.index == 1 and found.reached == [pytest.approx(17.5), pytest.approx(15.0)]


def test_the_quickest_may_be_told_by_another_measure_than_rounds():
    found = run.quickest_setting(curves([[0.1, 0.9]], [[0.5, 0.9]]), "accuracy", 0.7, at="seconds")
    assert found.index == 1 and found.reached == [pytest.approx(3.5)]


def test_where_no_seed_gets_there_the_best_at_the_end_is_chosen_and_nan_never():
    found = run.quickest_setting(curves([[0.1, np.nan]], [[0.3, 0.2]], [[0.1, 0.4]]), "accuracy", 0.7)
    assert found.index == 2 and found.reached == [None]


def test_a_value_at_either_end_of_those_tried_is_told_but_not_one_of_a_single_value():
    settings = [{"rate": rate, "mu": 0.5} for rate in (0.1, 0.3, 1.0)]
    result = run.Sweep(settings, np.array([1]), {}, (), 1)
    assert [run.at_an_end(result, setting) for setting in settings] == [["rate"], [], ["rate"]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run.sweep_table(made_up([[0.1]]), "loss"), r"metric='loss'\): judged were \['accuracy'\]; name"),
        (lambda: run.best_setting(made_up([[0.1]]), "accuracy", order=sum), r"order must be max or min"),
        (lambda: run.best_setting(made_up([[math.nan]]), "accuracy"), r"no setting ended finite; sweep lower"),
        (lambda: run.quickest_setting(made_up([[0.1]]), "loss", 0.5), r"quickest_setting\(metric='loss'\): judged"),
        (
            lambda: run.quickest_setting(made_up([[0.1]]), "accuracy", 0.5, at="seconds"),
            r"quickest_setting\(metric='seconds'\): judged",
        ),
    ],
)
def test_bad_input_is_an_error_of_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
