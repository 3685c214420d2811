"""Tiny models of many kinds, each with rows that a plain Trainer trains it on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import peft
import torch
from helpers import LENGTH, VOCABULARY, bert, gpt2, llama
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

__all__ = ["ADAPTERS", "KINDS", "PLAIN", "rows_for"]

SIDE = 8
NUM_ROWS = 8
TARGETS = ["q_proj", "v_proj", "up_proj"]


class Regression(nn.Module):
    """What transformers' own tests train: y = ax + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.a * x + self.b, labels)}


class Net(nn.Module):
    """A body that maps (batch, 4) to numbers, with the loss that a Trainer asks for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.body(x)
        out = out[0] if isinstance(out, tuple) else out
        return {"loss": nn.functional.mse_loss(out.mean(-1, keepdim=True), labels)}


class Empty(nn.Module):
    """A layer with nothing in it, beside one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing, self.linear = nn.Linear(0, 0), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=SIDE,
        patch_size=4,
        num_labels=2,
    )
    return ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return ResNetForImageClassification(config)


def mamba() -> nn.Module:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    return MambaForCausalLM(config)


def albert() -> nn.Module:
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return AlbertForMaskedLM(config)


def mixtral() -> nn.Module:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return MixtralForCausalLM(config)


class Contrastive(CLIPModel):
    """CLIP with its loss."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:
        return super().forward(input_ids, pixel_values, return_loss=True)


def clip() -> nn.Module:
    tower = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    text = {**tower, "vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1}
    vision = {**tower, "image_size": SIDE, "patch_size": 4}
    return Contrastive(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def frozen_but_its_head() -> nn.Module:
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return model


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: gpt2(num_layers=1),
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "mamba": mamba,
    "resnet": resnet,
    "albert": albert,
    "mixtral": mixtral,
    "clip": clip,
    "regression": Regression,
    "linear": lambda: Net(nn.Linear(4, 1)),
    "mlp": lambda: Net(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))),
    "lstm": lambda: Net(nn.LSTM(4, 8, num_layers=2)),
    "empty": lambda: Net(Empty()),
    "frozen but its head": frozen_but_its_head,
}

# Name: the configuration's class in peft, and its options.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, "target_modules": TARGETS}),
    "dora": ("LoraConfig", {"r": 2, "target_modules": TARGETS, "use_dora": True}),
    "rslora": ("LoraConfig", {"r": 2, "target_modules": TARGETS, "use_rslora": True}),
    "lora with a full copy": (
        "LoraConfig",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
    ),
    "lora of an embedding": ("LoraConfig", {"r": 2, "target_modules": ["embed_tokens"]}),
    "trained biases": ("LoraConfig", {"r": 2, "target_modules": TARGETS, "bias": "lora_only"}),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": TARGETS},
    ),
    "xlora": ("XLoraConfig", {"hidden_size": 16, "use_trainable_adapters": True}),
    "ia3": ("IA3Config", {"target_modules": TARGETS, "feedforward_modules": ["up_proj"]}),
    "vera": ("VeraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "loha": ("LoHaConfig", {"r": 2, "target_modules": TARGETS}),
    "lokr": ("LoKrConfig", {"r": 2, "target_modules": TARGETS}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "target_modules": TARGETS}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["q_proj"]}),
    "hra": ("HRAConfig", {"r": 2, "target_modules": TARGETS}),
    "randlora": ("RandLoraConfig", {"r": 2, "target_modules": TARGETS}),
    "vblora": ("VBLoRAConfig", {"r": 2, "vector_length": 4, "target_modules": TARGETS}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 8, "target_modules": TARGETS}),
    "shira": ("ShiraConfig", {"r": 1, "target_modules": TARGETS}),
    "miss": ("MissConfig", {"r": 2, "target_modules": TARGETS}),
    "road": ("RoadConfig", {"group_size": 8, "target_modules": TARGETS}),
    "c3a": ("C3AConfig", {"block_size": 4, "target_modules": TARGETS}),
    "hira": ("HiraConfig", {"r": 2, "target_modules": TARGETS}),
    "delora": ("DeloraConfig", {"r": 2, "target_modules": TARGETS}),
    "gralora": ("GraloraConfig", {"r": 2, "gralora_k": 2, "target_modules": TARGETS}),
    "ln tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 2}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 2}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 2, "encoder_hidden_size": 8}),
}


def adapted(name: str) -> nn.Module:
    """Return a tiny Llama with an adapter."""
    class_name, options = ADAPTERS[name]
    base, config_class = llama(), getattr(peft, class_name)
    if class_name != "XLoraConfig":
        return peft.get_peft_model(base, config_class(task_type="CAUSAL_LM", **options))
    with tempfile.TemporaryDirectory() as folder:  # a mixture of adapters on a disk
        adapter = peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
        peft.get_peft_model(llama(), adapter).save_pretrained(folder)
        config = config_class(task_type="CAUSAL_LM", adapters={"0": folder, "1": folder}, **options)
        base.config.use_cache = False
        return peft.get_peft_model(base, config)


KINDS: dict[str, Callable[[], nn.Module]] = {
    **PLAIN,
    **{
        name: lambda name=name: adapted(name)  # type: ignore[misc]
        for name, (class_name, _) in ADAPTERS.items()
        # The oldest peft that is supported has fewer; and BOFT compiles something for CUDA.
        if hasattr(peft, class_name) and not (name == "boft" and torch.cuda.is_available())
    },
}


def rows_for(kind: str) -> list[dict[str, Any]]:
    """Return rows of what the forward of this kind takes."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY - 1, (NUM_ROWS, LENGTH), generator=generator)
    images = torch.randn(NUM_ROWS, 3, SIDE, SIDE, generator=generator)
    numbers = torch.randn(NUM_ROWS, 4, generator=generator)
    if kind in ("vit", "resnet", "frozen but its head"):
        return [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)]
    if kind == "clip":
        return [
            {"input_ids": one, "pixel_values": image}
            for one, image in zip(tokens, images, strict=True)
        ]
    if kind == "regression":
        return [{"x": x[0], "labels": 2 * x[0] + 1} for x in numbers]
    if kind in ("linear", "mlp", "lstm", "empty"):
        return [{"x": x, "labels": x.sum(0, keepdim=True)} for x in numbers]
    return [{"input_ids": one, "labels": one} for one in tokens]
