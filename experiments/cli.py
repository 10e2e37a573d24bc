"""The command line `foveate`: typed options, one entry for every command, bad input told in one line."""

import io
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro
from PIL import Image
from safetensors import SafetensorError

from foveate.experiments.ambiguity import Ambiguity
from foveate.experiments.attending import Attend
from foveate.experiments.bench import Bench
from foveate.experiments.demo import Demo
from foveate.experiments.density import Density
from foveate.experiments.learning import Learn
from foveate.experiments.likelihood import Likelihood
from foveate.experiments.localisation import Localisation
from foveate.experiments.options import Common
from foveate.experiments.scoring import Evaluate
from foveate.experiments.training import Sample, Train
from foveate.model.errors import InputError

__all__ = ["COMMANDS", "main"]

# A command is a dataclass of options with a method `run`; one more entry here is one more command.
COMMANDS: dict[str, type[Common]] = {
    "demo": Demo,
    "train": Train,
    "learn": Learn,
    "attend": Attend,
    "evaluate": Evaluate,
    "sample": Sample,
    "likelihood": Likelihood,
    "localisation": Localisation,
    "density": Density,
    "ambiguity": Ambiguity,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 after input that cannot be used, 1 where the machine gave up.

    Args:
        arguments: the words behind `foveate`; those of this process by default.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A table's minus, or a name, may be more than the terminal's encoding has; it is no reason to fail at the end.
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(format="%(message)s")  # what was converted about pictures, to standard error
    # Of photographs of 90 megapixels and more; Pillow refuses by an error what is twice as large.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    commands = [Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)] for name, kind in COMMANDS.items()]
    # A union of as many types as there are entries, which cannot be written with |.
    anyone: Any = Union[tuple(commands)]  # noqa: UP007
    command = tyro.cli(
        anyone,
        prog="foveate",
        description="Where is the object, and how sure: a generative model of visual attention.",
        args=None if arguments is None else list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    name = next(name for name, kind in COMMANDS.items() if isinstance(command, kind))
    try:
        command.prepare()
        command.run()
    except InputError as error:
        print(f"foveate {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        # A full disk, a folder that was taken away: nothing that a traceback would explain.
        print(f"foveate {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"foveate {name}: interrupted", file=sys.stderr)
        return 130
    return 0
