"""The small table of `evaluate`: every figure stands in the row that names it."""

from typing import Any

from foveate.experiments.scoring import score_rows

RESULTS: dict[str, Any] = {
    "scenes": 75,
    "accuracy": 0.9467,
    "mean_iou": 0.7312,
    "median_iou": 0.7523,
    "seconds_per_scene": 1.256,
    "bound_nats": 412.34,
    "bound_nats_se": 8.76,
    "bound_gaussian": 398.21,
    "bound_student_t": 405.67,
    "log_z": 51.236,
    "log_z_se": 0.043,
    "acceptance_rate": 0.812,
    "divergences": 3,
    "rhat_max": 1.0214,
    "rhat_undefined": 0,
    "ess_min": 87.6,
}


def test_every_score_stands_in_the_row_that_names_it() -> None:
    assert score_rows(RESULTS) == [
        ("scenes", "75"),
        ("accuracy (IoU > 0.5)", "0.947"),
        ("mean IoU", "0.731"),
        ("median IoU", "0.752"),
        ("seconds per scene", "1.26"),
        ("bound on log p of true crops, nats", "412.3 ± 8.8"),
        ("the same, one Gaussian", "398.2"),
        ("the same, one Student-t", "405.7"),
        ("log Z of the prior, nats", "51.24 ± 0.04"),
        ("acceptance rate", "0.81"),
        ("divergences", "3"),
        ("largest R-hat", "1.021"),
        ("smallest ESS", "88"),
    ]


def test_what_is_not_known_is_told_and_no_error_is_made_up() -> None:
    rows = dict(score_rows({**RESULTS, "bound_nats_se": None, "rhat_max": None, "ess_min": None, "rhat_undefined": 2}))
    assert rows["bound on log p of true crops, nats"] == "412.3"
    assert rows["largest R-hat"] == "not known (2 scenes without: chains that stand still, or too few draws)"
    assert rows["smallest ESS"] == "not known"
