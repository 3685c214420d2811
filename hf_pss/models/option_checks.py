"""Check the options against one model and its backend: reject some, and warn of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from hf_pss.config import PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.linalg.smoothing import looks_trained
from hf_pss.models.measurements import Measurements, needs_no_matrix
from hf_pss.models.selection import Selection
from hf_pss.models.selection.select import what_to_do, why_empty

_FLOOR = "stable_rank_floor"


def only_observes(config: PSSConfig, selection: Selection) -> bool:
    """Return whether no option lets PSS change a weight or an update of this model."""
    has_nothing = not selection.matrices and not selection.adapters
    return config.observe_only or (has_nothing and config.spike_update != "skip")


def tries_interventions(config: PSSConfig, selection: Selection) -> bool:
    """Return whether the options ask for trials, and an intervention can occur."""
    is_reached = config.reacts_to_spikes or (config.trial == "all" and bool(config.detectors))
    return config.trial != "off" and is_reached and not only_observes(config, selection)


def response_to_nonfinite(config: PSSConfig, measurements: Measurements) -> Literal["skip", "stop"]:
    """Return the response to a non-finite step that the backend allows.

    Raises:
        ConfigurationError: An option needs gradients that no longer exist, or needs
            to hold an update back.
    """
    if measurements.backend.can_hold_back:
        return config.on_nonfinite
    too_late = sorted({"matrix_grad_norm_ratio", "update_norm_ratio"} & {*config.detectors})
    if config.spike_update == "skip":
        too_late.append("spike_update='skip'")
    if too_late:
        raise ConfigurationError(
            f"{' and '.join(too_late)} cannot work under DeepSpeed, which has applied the update, "
            "and dropped the gradients, before PSS can look at them. Use grad_norm_ratio or "
            "stable_rank_floor, with spike_update='apply'."
        )
    return "stop"


def option_warnings(
    config: PSSConfig, measurements: Measurements, *, has_loss: bool, has_trainer: bool
) -> Iterator[str]:
    """Yield warnings about options that have no effect or a dangerous effect. Collective.

    Args:
        config: The options.
        measurements: The measurements of the model.
        has_loss: Whether the controller was given ``evaluate_loss``.
        has_trainer: Whether the callback of a Trainer applies the options that need one. The
            callback also warns of missing matrices.
    """
    yield from measurements.backend.cautions(measurements.parameters())
    acts_on_spikes = config.reacts_to_spikes and not config.observe_only
    if config.anchor == config.trial == "off" and acts_on_spikes:
        if looks_trained(measurements.shapes, measurements.stable_ranks()):
            yield (
                "These weights look trained, and without an anchor one false alarm can destroy "
                "what they have learned: use the preset anchored for fine-tuning."
            )
    if tries_interventions(config, measurements.selection) and not has_loss:
        yield (
            "PSS cannot try interventions before it keeps them, because it was given no "
            "evaluate_loss. Pass one to PSSController, or set trial='off'."
        )
    if measurements.selection.adapters and config.moments != "keep":
        yield (
            f"moments={config.moments!r}: the first moments of LoRA factors are kept. Only those "
            "of complete matrices are edited."
        )
    if has_trainer:
        return
    if config.smooth_on_resume:
        yield (
            "smooth_on_resume has no effect in your own training loop. Call smooth_now() "
            "once after load_state_dict()."
        )
    if warning := nothing_to_watch(config, measurements):
        yield warning


def nothing_to_watch(
    config: PSSConfig, measurements: Measurements, spelling: str = "PSSConfig({})"
) -> str | None:
    """Return a warning about detectors that find no matrix in this model, or None.

    Args:
        config: The options.
        measurements: The measurements of the model.
        spelling: How the caller writes an option. The braces stand for ``name=value``.
    """
    if needs_no_matrix(config):
        return None
    guard = (
        "Steps that are not finite are still reported, but observe_only also leaves them alone."
        if config.observe_only
        else "The guard against steps that are not finite stays."
    )
    selection = measurements.selection
    others = [name for name in config.detectors if name != _FLOOR]
    if selection.adapters:
        if _FLOOR not in config.detectors:
            return None
        warning = (
            f"{_FLOOR} does not watch the {len(selection.adapters)} LoRA products: an adapter "
            "starts at zero and has no healthy spectrum to refer to."
        )
        if others:
            return f"{warning} {', '.join(others)} does."
        rest = "" if selection.matrices else f" Nothing else is left to watch. {guard}"
        option = spelling.format("detectors=['grad_norm_ratio']")
        return f"{warning}{rest} To watch them, choose {option}."
    if selection.matrices:
        return None
    advice = what_to_do(measurements.model, exclude=config.exclude, spelling=spelling)
    spikes = (
        "Spikes of the gradient norm are reported, but there is nothing to smooth. "
        if "grad_norm_ratio" in others
        else ""
    )
    return f"{why_empty(selection)} {spikes}{guard} {advice}"
