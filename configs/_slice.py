"""Sets what a machine needs to hold a run's batch."""

from ml_collections import ConfigDict


def apply(config: ConfigDict, name: str, slices: dict[str, dict]) -> None:
    """Sets the settings of slices[name], {'model.remat': 'full', ...}; nothing for ''.

    Raises:
      ValueError: an unknown name.
    """
    if name and name not in slices:
        raise ValueError(
            f"slice={name!r} is none of {', '.join(slices)}; python -m programs.compile_only "
            f"--topology {name} --fit finds settings for another one"
        )
    for key, value in slices.get(name, {}).items():
        *blocks, last = key.split(".")
        block = config
        for part in blocks:
            if part not in block:
                block[part] = ConfigDict()
            block = block[part]
        block[last] = value
