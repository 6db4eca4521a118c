"""Training over devices: data-parallel, with sharded optimizers, seldom synchronised, or asynchronous."""
