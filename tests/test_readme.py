"""What the documents say is true."""

import re
from pathlib import Path

import pytest

from jfed import algorithms

HOUSE = Path(__file__).parents[1]
README = (HOUSE / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [HOUSE / "README.md", *(HOUSE / "docs").glob("*.md"), *(HOUSE / "benchmarks").glob("*.md")]


def test_the_code_of_the_readme_runs_and_learns(capsys):
    names = {}
    for block in BLOCKS:
        exec(block, names)
    assert BLOCKS and 0.3 < float(names["run"].evaluate(
        names["models"].metrics(names["model"]), names["fedavg"].params(names["state"]), names["test"]
    )["accuracy"])  # fmt: skip
    assert "accuracy" in capsys.readouterr().out


def test_every_method_has_its_place_in_the_readme():
    for name in algorithms.__all__:
        if name.islower():
            assert f"`{name}`" in README or f"`algorithms.{name}`" in README, name


def test_results_are_there_for_every_experiment_and_benchmark():
    results = (HOUSE / "benchmarks" / "RESULTS.md").read_text()
    scripts = [*(HOUSE / "experiments").glob("*.py"), *(HOUSE / "benchmarks").glob("*.py")]
    assert not [script.name for script in scripts if script.name not in results]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_within_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_two_commands_install_what_the_project_offers():
    extras = re.findall(r'pip install -q -e "\.\[(\w+)\]"', README)
    declared = (HOUSE / "pyproject.toml").read_text()
    assert extras == ["experiments", "test"] and all(f"\n{extra} = [" in declared for extra in extras)
