"""PSS as a plugin of axolotl, whose YAML file then takes the ``pss_*`` options."""

from __future__ import annotations

from typing import Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import create_model

from hf_pss.config import PSSConfig, spelt_as_arguments
from hf_pss.trainer.callback import PSSCallback

# None keeps the value of the preset. PSSConfig checks the ranges.
_HINTS: dict[str, Any] = {"preset": str, **get_type_hints(PSSConfig)}
_FIELDS: dict[str, Any] = {f"pss_{name}": (hint | None, None) for name, hint in _HINTS.items()}
PSSAxolotlOptions = create_model("PSSAxolotlOptions", **_FIELDS)


class PSSPlugin(BasePlugin):
    """Attaches a `PSSCallback` to the trainer that axolotl builds.

    ```yaml
    plugins: [hf_pss.integrations.axolotl.PSSPlugin]
    pss_preset: anchored
    ```

    Raises:
        ConfigurationError: An option is out of range, or PSS cannot work with the trainer.
    """

    def get_input_args(self) -> str:
        """Return the import path of the options that this plugin adds to axolotl's YAML file."""
        return f"{__name__}.{PSSAxolotlOptions.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach PSS with the options of the YAML file."""
        given = {name: cfg[f"pss_{name}"] for name in _HINTS}
        given = {name: value for name, value in given.items() if value is not None}
        with spelt_as_arguments(PSSConfig):
            config = PSSConfig.preset(given.pop("preset", "anchored"), **given)
        PSSCallback(config).attach(trainer)
