"""The command `evaluate`: scores of a run against known gazes, and the small table that tells them."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from foveate.data import Scenes
from foveate.experiments.options import Common, announce, open_run, print_table, require_at_least
from foveate.experiments.outputs import check_json
from foveate.inference.checkpoint import write_json
from foveate.inference.evaluate import evaluate

__all__ = ["Evaluate", "Sampling", "score_rows"]


@dataclass(frozen=True)
class Sampling:
    """How much to sample in every scene.

    Attributes:
        chains: that run side by side.
        draws: kept of each chain.
        warmup: draws before them that adapt the step size.
    """

    chains: int = 4
    draws: int = 100
    warmup: int = 60

    def check(self) -> None:
        """Refuse numbers that give no draws.

        Raises:
            InputError: naming the option.
        """
        require_at_least("--chains", self.chains, 1)
        require_at_least("--draws", self.draws, 1)
        require_at_least("--warmup", self.warmup, 0)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Score a run against scenes with known gazes.

    Attributes:
        source: the run.
        data: orl, caltech:DIR, webfaces:DIR, lfw:DIR, multipie:DIR or folder:DIR, with @train or @test; one at
            least; repeatable.
        out: a .json file; earlier results there are replaced.
        start: scene gives no initial gaze; jitter is the paper's protocol, a random gaze about the truth.
        sampling: how much to sample.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: Path
    start: Literal["scene", "jitter"] = "scene"
    sampling: Sampling = field(default_factory=Sampling)

    def run(self) -> None:
        self.sampling.check()
        check_json(self.out, "accuracy")
        run = open_run(self.source, self.torch_device)
        scenes = Scenes.from_specs(self.data, seed=self.seed).labelled()
        announce(f"attending to {len(scenes)} scenes; the scores go to {self.out}")
        scenes.preload(progress=sys.stderr.isatty())
        how_much: dict[str, Any] = dataclasses.asdict(self.sampling)
        results, _ = evaluate(run, scenes, start=self.start, **how_much, seed=self.seed, progress=True)
        write_json(self.out, results)
        print_table(("score", "value"), score_rows(results))
        print(f"\n{self.out}")


def score_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The results of `foveate.inference.evaluate.evaluate` in words and numbers, a row each."""

    def number(key: str, digits: int) -> str:
        return "not known" if results[key] is None else f"{results[key]:.{digits}f}"

    bound_error = "" if results["bound_nats_se"] is None else f" ± {results['bound_nats_se']:.1f}"
    undefined = results["rhat_undefined"]
    without_rhat = f" ({undefined} scenes without: chains that stand still, or too few draws)" if undefined else ""
    return [
        ("scenes", str(results["scenes"])),
        ("accuracy (IoU > 0.5)", number("accuracy", 3)),
        ("mean IoU", number("mean_iou", 3)),
        ("median IoU", number("median_iou", 3)),
        ("seconds per scene", number("seconds_per_scene", 2)),
        ("bound on log p of true crops, nats", number("bound_nats", 1) + bound_error),
        ("the same, one Gaussian", number("bound_gaussian", 1)),
        ("the same, one Student-t", number("bound_student_t", 1)),
        ("log Z of the prior, nats", f"{results['log_z']:.2f} ± {results['log_z_se']:.2f}"),
        ("acceptance rate", number("acceptance_rate", 2)),
        ("divergences", str(results["divergences"])),
        ("largest R-hat", number("rhat_max", 3) + without_rhat),
        ("smallest ESS", number("ess_min", 0)),
    ]
