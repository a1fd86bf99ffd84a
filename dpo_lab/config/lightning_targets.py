"""Lightning's own callbacks, loggers, profilers and strategies: those that a config may name, and why not the others.

Together the two tables name everything that these modules of Lightning export. A class that a later version adds is in
neither, and so may not be named.
"""

from __future__ import annotations

PACKAGE = "lightning.pytorch"

# By module: the classes that a config may name. They take plain values and leave an exact resume as it is.
ALLOWED = {
    "callbacks": (
        "DeviceStatsMonitor EarlyStopping LearningRateMonitor ModelCheckpoint ModelSummary RichModelSummary RichProgressBar"
        " TQDMProgressBar"
    ).split(),
    "loggers": "CSVLogger MLFlowLogger TensorBoardLogger WandbLogger".split(),
    "profilers": "AdvancedProfiler PassThroughProfiler PyTorchProfiler SimpleProfiler".split(),
    "strategies": "DDPStrategy SingleDeviceStrategy".split(),
}

BASE = "a base class, which does nothing by itself"
TRIALS = "trains trial steps of its own before the first step, and a step here divides itself into micro-batches"
AVERAGES = "holds the average in place of the weights during a validation, where a run that is stopped saves them"
ACCOUNT = "sends results to a service that no test reaches; type logger=wandb, logger=mlflow or logger=tensorboard"
CHECKPOINTS = "writes checkpoints of its own, which are neither verified nor resumed; type trainer=fsdp or trainer=ddp"
XLA = "needs a TPU, on which this package was never run"

# By module and class: why a config may not name it, and what to type instead.
EXCEPTIONS = {
    "callbacks": {
        "BackboneFinetuning": "unfreezes a module `backbone`, which a policy has not; type policy=lora to train less of it",
        "BaseFinetuning": BASE,
        "BasePredictionWriter": BASE,
        "BatchSizeFinder": f"{TRIALS}; type data.tokens_per_microbatch=auto",
        "Callback": BASE,
        "Checkpoint": BASE,
        "EMAWeightAveraging": AVERAGES,
        "GradientAccumulationScheduler": "a step is data.batch_size pairs; type data.batch_size=N",
        "LambdaCallback": "takes functions; write a callback of your own in a plugin",
        "LearningRateFinder": f"{TRIALS}; type --multirun optim.lr=1e-4,3e-4,1e-3",
        "ModelPruning": "renames the weights, so that neither checkpoint nor policy can be read again",
        "OnExceptionCheckpoint": "saves by a collective on the one rank that failed, and the others wait; checkpoints are"
        " saved by callbacks.checkpoint",
        "ProgressBar": BASE,
        "SpikeDetection": "takes the loss that a step returns, and a step here returns none",
        "StochasticWeightAveraging": "replaces the schedule of the learning rate, without which a run can't be resumed",
        "ThroughputMonitor": "takes a function; a run's record has its tokens per second",
        "Timer": "ends a run as if it were done; type +trainer.max_time=00:01:00:00, after which it can be resumed",
        "WeightAveraging": AVERAGES,
    },
    "loggers": {"CometLogger": ACCOUNT, "LitLogger": ACCOUNT, "Logger": BASE},
    "profilers": {"Profiler": BASE, "XLAProfiler": XLA},
    "strategies": {
        "DeepSpeedStrategy": CHECKPOINTS,
        "FSDPStrategy": CHECKPOINTS,
        "ModelParallelStrategy": CHECKPOINTS,
        "ParallelStrategy": BASE,
        "SingleDeviceXLAStrategy": XLA,
        "Strategy": BASE,
        "XLAStrategy": XLA,
    },
}


def names() -> set[str]:
    """Return the full names of the classes that a config may name."""
    return {f"{PACKAGE}.{module}.{name}" for module, allowed in ALLOWED.items() for name in allowed}


def reason(target: str) -> str | None:
    """Return why a config may not name a class of Lightning; None if it is not one of EXCEPTIONS."""
    path, _, name = target.rpartition(".")
    return EXCEPTIONS.get(path.removeprefix(f"{PACKAGE}."), {}).get(name)
