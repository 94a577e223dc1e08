"""What can go wrong before a request is served: configuration, start, stop. Each message names cause and next step.

The command line prints these as they are; they never travel over HTTP.
"""


class SetupError(Exception):
    """Base: the operator has to do something."""


class ConfigError(SetupError):
    """`ray_config.yaml` or a variable of the environment is wrong."""


class StartRefused(SetupError):
    """This machine cannot run what is asked for: port taken, already running, too little memory, disk or CPUs."""


class StartFailed(SetupError):
    """Something that was started did not become ready."""


class NotRunning(SetupError):
    """No windfarm runs on this data folder."""
