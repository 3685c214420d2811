"""Maxima of attention logits against logits in float64, and what QK-clip makes of them.

The reference reads the input of an attention module and computes q·k by the architecture's own
formulas, whole, with biases, rotation and masks, in float64.
"""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arguments, make_trainer, weights_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from hf_pss import ConfigurationError, PSSTrainer, PSSTrainingArguments
from hf_pss.optim import build_optimizer
from hf_pss.optim.qk_clip import QKClip
from hf_pss.trainer import attention_maxima
from hf_pss.trainer.attention_maxima import AttentionMaxima, MeasureAttention

# Relative to the largest logit.
MAXIMUM_TOLERANCE = 6e-7  # 2.3e-7
CLIPPED_TOLERANCE = 7e-7  # 2.4e-7
BFLOAT16_TOLERANCE = 7e-3  # 2.7e-3
# Absolute, of weights of the order 1.
ACCUMULATED_DRIFT = 5e-7  # 0.0; a rounding where a product sums in another order

LENGTH, VOCABULARY = 16, 32
Reference = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Tensor]]


def gpt2(**options: Any) -> Any:
    config = GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        **options,
    )
    return _loud(GPT2LMHeadModel(config))


def llama() -> Any:
    return _loud(LlamaForCausalLM(LlamaConfig(**_GROUPED, attention_bias=True)))


def neox() -> Any:
    config = GPTNeoXConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    return _loud(GPTNeoXForCausalLM(config))


_GROUPED: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
}


def _loud(model: Any) -> Any:
    """Make logits large and unequal, biases matter, and models of one class equal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 or "attn" in name or "attention" in name:
                is_loud = p.ndim == 2 and ("attn" in name or "attention" in name)
                p.copy_(torch.randn(p.shape, generator=generator) * (0.8 if is_loud else 0.3))
    return model.train()


def gpt2_heads(module: Any, x: Tensor, given: Any) -> tuple[Tensor, Tensor]:
    weight, bias = module.c_attn.weight.double(), module.c_attn.bias.double()
    q, k, _ = (x @ weight + bias).split(x.shape[-1], dim=-1)
    return _divided(q, 4), _divided(k, 4)


def llama_heads(module: Any, x: Tensor, given: Any) -> tuple[Tensor, Tensor]:
    q, k = (
        x @ linear.weight.double().T + (0.0 if linear.bias is None else linear.bias.double())
        for linear in (module.q_proj, module.k_proj)
    )
    q, k = (_rotated(_divided(t, n), given, 8) for t, n in ((q, 4), (k, 2)))
    return q, k.repeat_interleave(2, dim=1)


def neox_heads(module: Any, x: Tensor, given: Any) -> tuple[Tensor, Tensor]:
    fused = x @ module.query_key_value.weight.double().T + module.query_key_value.bias.double()
    heads = fused.unflatten(-1, (4, 3, 8)).transpose(1, 2)
    rotary = given["position_embeddings"][0].shape[-1]
    return _rotated(heads[..., 0, :], given, rotary), _rotated(heads[..., 1, :], given, rotary)


def _divided(t: Tensor, num_heads: int) -> Tensor:
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _rotated(t: Tensor, given: Any, width: int) -> Tensor:
    cos, sin = (part.double()[:, None] for part in given["position_embeddings"])
    turned, rest = t[..., :width], t[..., width:]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


MODELS: dict[str, tuple[Callable[[], Any], str, Reference]] = {
    "gpt2": (gpt2, "transformer.h.0.attn", gpt2_heads),
    "llama": (llama, "model.layers.0.self_attn", llama_heads),
    "neox": (neox, "gpt_neox.layers.0.attention", neox_heads),
}
on_each_model = pytest.mark.parametrize("name", MODELS)


def batch(*, padding: str | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    if padding == "right":
        mask[1, 9:] = 0
    elif padding == "left":
        mask[1, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def exact_maxima(
    model: Any,
    name: str,
    rows: dict[str, Tensor],
    *,
    every: bool = False,
    window: int | None = None,
) -> Tensor:
    """Return S_h, (heads,), float64; every: of all positions, masked ones too."""
    _, path, reference = MODELS[name]
    module = model.get_submodule(path)
    seen: list[Any] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, given: seen.append((args, given)), with_kwargs=True
    )
    with torch.no_grad():
        model(**rows)
        hook.remove()
        ((args, given),) = seen
        x = (args[0] if args else given["hidden_states"]).double()
        q, k = reference(module, x, given)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
    real = rows["attention_mask"].bool()
    counts = real[:, None, :, None] & real[:, None, None, :]
    counts = counts & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if window is not None:
        counts = counts & torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1 - window)
    return (logits if every else logits.masked_fill(~counts, -torch.inf)).amax(dim=(0, 2, 3))


def measured(model: Any, rows: dict[str, Tensor]) -> tuple[AttentionMaxima, Tensor]:
    """Run a batch; return the meter and the output."""
    maxima = AttentionMaxima(model)
    maxima.start()
    try:
        output: Tensor = model(**rows).logits.detach()
    finally:
        maxima.stop()
    return maxima, output


def far(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().abs().max())


# ---- measurement ----


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@on_each_model
def test_maxima_are_those_of_float64(name: str, implementation: str, padding: str | None) -> None:
    make, path, _ = MODELS[name]
    model, rows = make(), batch(padding=padding)
    model.set_attn_implementation(implementation)
    maxima, _ = measured(model, rows)
    wanted = exact_maxima(model, name, rows)
    assert far(maxima.read()[path], wanted) <= MAXIMUM_TOLERANCE
    assert far(maxima.take()[0], wanted) <= MAXIMUM_TOLERANCE
    assert maxima.read() == {}


@on_each_model
def test_the_check_can_fail(name: str) -> None:
    """Positions that do not count have larger logits."""
    rows = batch(padding="right")
    model = MODELS[name][0]()
    wanted = exact_maxima(model, name, rows)
    assert far(exact_maxima(model, name, rows, every=True), wanted) > MAXIMUM_TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@on_each_model
def test_outputs_and_gradients_keep_their_bits(name: str, implementation: str) -> None:
    rows = batch(padding="left")
    results = []
    for is_measured in (False, True):
        model = MODELS[name][0]()
        model.set_attn_implementation(implementation)
        maxima = AttentionMaxima(model)
        if is_measured:
            maxima.start()
        output = model(**rows, labels=rows["input_ids"])
        output.loss.backward()
        maxima.stop()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([output.logits.detach(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_each_model
def test_blocks_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batch(padding="right")
    path = MODELS[name][1]
    whole = measured(MODELS[name][0](), rows)[0].read()[path]
    monkeypatch.setattr(attention_maxima, "_MAX_ELEMENTS_CPU", 3 * 4 * LENGTH * 5)  # five rows
    blocks = measured(MODELS[name][0](), rows)[0].read()[path]
    assert far(blocks, whole) <= MAXIMUM_TOLERANCE


def test_bfloat16() -> None:
    rows = batch()
    model = gpt2().bfloat16()
    found = measured(model, rows)[0].read()["transformer.h.0.attn"]
    assert found.dtype == torch.float32
    assert far(found, exact_maxima(model, "gpt2", rows)) <= BFLOAT16_TOLERANCE


def test_micro_batches_add_up_to_their_largest() -> None:
    model, rows = gpt2(), batch()
    maxima = AttentionMaxima(model)
    maxima.start()
    for i in range(3):
        model(**{key: value[i : i + 1] for key, value in rows.items()})
    maxima.stop()
    assert far(maxima.take()[0], exact_maxima(model, "gpt2", rows)) <= MAXIMUM_TOLERANCE


def test_evaluation_is_measured_on_demand() -> None:
    model, rows = gpt2().eval(), batch()
    assert measured(model, rows)[0].read() == {}
    maxima = AttentionMaxima(model, in_evaluation=True)
    maxima.start()
    model(**rows)
    maxima.stop()
    assert far(maxima.take()[0], exact_maxima(model, "gpt2", rows)) <= MAXIMUM_TOLERANCE


def test_nothing_is_left_behind() -> None:
    before = AttentionInterface.get_interface
    one, other = AttentionMaxima(gpt2()), AttentionMaxima(llama())
    one.start()
    other.start()
    one.stop()
    assert AttentionInterface.get_interface is not before
    other.stop()
    other.stop()
    assert AttentionInterface.get_interface is before


def test_both_sides_of_an_encoder_are_seen() -> None:
    """Without a causal mask, and with none at all."""
    config = BertConfig(
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False).train()
    maxima = AttentionMaxima(model)
    inputs: list[Any] = []
    module = model.encoder.layer[0].attention.self
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    maxima.start()
    model(input_ids=batch()["input_ids"])
    maxima.stop()
    q, k = (
        _divided(inputs[0] @ linear.weight.double().T + linear.bias.double(), 2)
        for linear in (module.query, module.key)
    )
    wanted = (q @ k.mT / math.sqrt(8)).amax(dim=(0, 2, 3))
    assert far(maxima.take()[0], wanted) <= MAXIMUM_TOLERANCE


def test_sliding_windows_are_masked() -> None:
    """Far keys do not count."""
    wanted, rows = [], batch(padding="right")
    for window in (2, 5, None):
        model = _loud(MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=window)))
        wanted.append(exact_maxima(model, "llama", rows, window=window))
        assert far(measured(model, rows)[0].take()[0], wanted[-1]) <= MAXIMUM_TOLERANCE
    assert far(wanted[0], wanted[1]) > MAXIMUM_TOLERANCE
    assert far(wanted[1], wanted[2]) > MAXIMUM_TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("target_length", [1, 8, 9])
def test_cross_attention_counts_every_query(implementation: str, target_length: int) -> None:
    """Position i of the source says nothing of position i of the target, equally long or not."""
    config = BartConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        attn_implementation=implementation,
        dropout=0.0,
    )
    model = _loud(BartModel(config))
    module = model.decoder.layers[0].encoder_attn
    seen: dict[str, Tensor] = {}
    for label in ("q", "k"):
        linear = getattr(module, f"{label}_proj")
        linear.register_forward_hook(lambda _, args, out, label=label: seen.update({label: out}))
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    target = torch.randint(3, VOCABULARY, (2, target_length), generator=generator)
    mask = torch.ones_like(source)
    mask[0, 3:] = mask[1, 5:] = 0
    maxima = AttentionMaxima(model)
    maxima.start()
    model(input_ids=source, attention_mask=mask, decoder_input_ids=target)
    maxima.stop()
    q, k = (_divided(seen[label].double(), 2) for label in ("q", "k"))
    logits = (q @ k.mT / math.sqrt(8)).masked_fill(~mask.bool()[:, None, None, :], -torch.inf)
    found = maxima.read()["decoder.layers.0.encoder_attn"]
    assert far(found, logits.amax(dim=(0, 2, 3))) <= MAXIMUM_TOLERANCE


def test_cross_attention_under_flash() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, LENGTH, 8, generator=generator) for _ in range(2))
    padding = batch(padding="right")["attention_mask"][:2]
    module = BartModel(BartConfig(encoder_layers=1, decoder_layers=1, d_model=16, vocab_size=32))
    counts = attention_maxima._counted(
        module.decoder.layers[0].encoder_attn,
        query,
        key,
        padding,
        name="flash_attention_2",
        options={},
        is_cross=True,
    )
    logits = query.double() @ key.double().mT
    logits = logits.masked_fill(~padding.bool()[:, None, None, :], -torch.inf)
    found = attention_maxima._largest_logits(query, key, counts)
    assert far(found, logits.amax(dim=(0, 2, 3))) <= MAXIMUM_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_cast", [False, True])
def test_large_logits_do_not_overflow(dtype: torch.dtype, is_cast: bool) -> None:
    """q·k of 102,400 before scaling is more than float16 has, also under autocast."""
    model = gpt2()
    maxima = AttentionMaxima(model)
    module = model.transformer.h[0].attn
    q = torch.full((1, 4, 2, 64), 40.0, dtype=torch.float32 if is_cast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=is_cast and dtype != torch.float32):
        maxima.see(module, q, q, None, name="sdpa", options={})
    found = maxima.read()["transformer.h.0.attn"]
    assert far(found, torch.full((4,), 40 * 40 * 64 / 8)) <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [[16], [5, 11], [1, 1, 7, 7]])
def test_flash_attention_divides_a_row_by_positions(lengths: list[int], window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 4, LENGTH, 8, generator=generator) for _ in range(2))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    counts = attention_maxima._counted(
        gpt2().transformer.h[0].attn,
        query,
        key,
        None,
        name="flash_attention_2",
        options={"position_ids": positions, "sliding_window": window},
    )
    row = torch.arange(LENGTH)
    part = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    behind = row[:, None] - row
    seen = (behind >= 0) & (behind < (window or LENGTH)) & (part[:, None] == part)
    logits = (query.double() @ key.double().mT).masked_fill(~seen, -torch.inf)
    found = attention_maxima._largest_logits(query, key, counts)
    assert far(found, logits.amax(dim=(0, 2, 3))) <= MAXIMUM_TOLERANCE


def test_a_forward_without_gradients_is_no_training_step() -> None:
    model = gpt2()
    maxima = AttentionMaxima(model)
    maxima.start()
    with torch.no_grad():
        model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
    maxima.stop()
    assert maxima.read() == {}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("is_padded", [False, True])
def test_flash_attention_is_read_by_its_own_rules(window: int | None, is_padded: bool) -> None:
    """Causal from the last key backwards, windows in the options, padding as (batch, keys)."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 4, LENGTH, 8, generator=generator) for _ in range(2))
    padding = batch(padding="right")["attention_mask"][:2] if is_padded else None
    module = gpt2().transformer.h[0].attn
    counts = attention_maxima._counted(
        module,
        query,
        key,
        padding,
        name="flash_attention_2",
        options={"sliding_window": window},
    )
    found = attention_maxima._largest_logits(query, key, counts)
    row = torch.arange(LENGTH)
    behind = row[:, None] - row
    seen = (behind >= 0) & (behind < (window or LENGTH))
    if padding is not None:
        real = padding.bool()
        seen = seen & real[:, None, :, None] & real[:, None, None, :]
    logits = (query.double() @ key.double().mT).masked_fill(~seen, -torch.inf)
    assert far(found, logits.amax(dim=(0, 2, 3))) <= MAXIMUM_TOLERANCE


# ---- refusals ----


@pytest.mark.parametrize(
    ("mask", "options", "words"),
    [(object(), {}, "masks that are tensors"), (None, {"cu_seq_lens_q": 1}, "cu_seq_lens_q")],
)
def test_masks_that_cannot_be_read_are_refused(mask: Any, options: Any, words: str) -> None:
    q = torch.zeros(1, 4, 3, 4)
    module = gpt2().transformer.h[0].attn
    with pytest.raises(ConfigurationError, match=words):
        attention_maxima._counted(module, q, q, mask, name="flex_attention", options=options)


def test_positions_of_another_shape_are_refused() -> None:
    q = torch.zeros(1, 4, 3, 4)
    module = gpt2().transformer.h[0].attn
    options = {"position_ids": torch.zeros(3, 1, 3)}
    with pytest.raises(ConfigurationError, match="by position_ids of shape"):
        attention_maxima._counted(module, q, q, None, name="flash_attention_2", options=options)


def test_copies_of_data_parallel_are_refused() -> None:
    model = gpt2()
    maxima = AttentionMaxima(model)
    replica = model.transformer.h[0].attn._replicate_for_data_parallel()
    q = torch.zeros(1, 4, 3, 4)
    with pytest.raises(ConfigurationError, match="copies that DataParallel makes"):
        maxima.see(replica, q, q, None, name="sdpa", options={})


def test_normalised_queries_are_refused() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8))
    with pytest.raises(ConfigurationError, match="q_norm normalises"):
        AttentionMaxima(model)


def test_attention_beside_the_interface_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=16, n_head=2, vocab_size=32))
    with pytest.raises(ConfigurationError, match="without the AttentionInterface"):
        AttentionMaxima(model)


def test_models_without_attention_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no known attention"):
        AttentionMaxima(nn.Sequential(nn.Linear(4, 4)))


def test_attention_that_is_never_seen_is_refused() -> None:
    maxima = AttentionMaxima(gpt2())
    assert (maxima.take() == -math.inf).all()  # nothing was to be seen yet
    maxima.start()
    with pytest.raises(ConfigurationError, match="were seen"):
        maxima.take()
    maxima.stop()


# ---- the clip ----


def heads_of_rows(model: Any, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return the rows of each query head and each key head, weight and bias in one."""
    module: Any = model.get_submodule(MODELS[name][1])
    if name == "gpt2":
        fused = torch.cat((module.c_attn.weight, module.c_attn.bias[None])).T
        q, k, _ = fused.split(16)
    elif name == "neox":
        linear = module.query_key_value
        fused = torch.cat((linear.weight, linear.bias[:, None]), dim=1).unflatten(0, (4, 3, 8))
        q, k = fused[:, 0].flatten(0, 1), fused[:, 1].flatten(0, 1)
    else:
        q, k = (
            torch.cat((linear.weight, linear.bias[:, None]), dim=1)
            for linear in (module.q_proj, module.k_proj)
        )
    width = 4 if name == "gpt2" else 8
    return list(q.detach().clone().split(width)), list(k.detach().clone().split(width))


@on_each_model
def test_after_the_clip_no_head_is_above_the_threshold(name: str) -> None:
    rows = batch(padding="right")
    model = MODELS[name][0]()
    before = exact_maxima(model, name, rows)
    threshold = float(before.sort().values[1:3].mean())  # two heads above, two below
    queries, keys = heads_of_rows(model, name)
    untouched = {n: p.detach().clone() for n, p in model.named_parameters()}
    maxima, _ = measured(model, rows)
    QKClip(maxima.attentions, maxima.take, threshold=threshold).clip_(maxima.take())
    after = exact_maxima(model, name, rows)
    is_above = before > threshold
    assert is_above.sum() == 2
    assert far(after, before.clamp(max=threshold)) <= CLIPPED_TOLERANCE
    now_queries, now_keys = heads_of_rows(model, name)
    for head in range(4):
        assert torch.equal(now_queries[head], queries[head]) == (not is_above[head])
    sharing = 4 // len(keys)
    for head in range(len(keys)):
        is_shared_with_clipped_alone = bool(is_above.view(-1, sharing)[head].all())
        assert torch.equal(now_keys[head], keys[head]) == (not is_shared_with_clipped_alone)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, untouched[n])}
    assert changed <= {
        n
        for n in untouched
        if any(x in n for x in ("q_proj", "k_proj", "c_attn", "query_key_value"))
    }


@on_each_model
def test_nothing_above_the_threshold_keeps_every_bit(name: str) -> None:
    model = MODELS[name][0]()
    before = weights_of(model)
    maxima, _ = measured(model, batch())
    QKClip(maxima.attentions, maxima.take, threshold=1e6).clip_(maxima.take())
    assert all(torch.equal(before[n], value) for n, value in weights_of(model).items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@on_each_model
def test_a_head_that_is_not_finite_is_left_alone(name: str, bad: float) -> None:
    model, rows = MODELS[name][0](), batch()
    with torch.no_grad():  # the first query head's weights
        module: Any = model.get_submodule(MODELS[name][1])
        linear = next(iter(module.children()))
        (linear.weight[:, 0] if name == "gpt2" else linear.weight[0]).fill_(bad)
    queries, keys = heads_of_rows(model, name)
    maxima, _ = measured(model, rows)
    largest = maxima.take()
    assert not largest[0, 0].isfinite()
    QKClip(maxima.attentions, maxima.take, threshold=1e-3).clip_(largest)
    now_queries, now_keys = heads_of_rows(model, name)
    assert torch.equal(now_queries[0].nan_to_num(), queries[0].nan_to_num())
    assert torch.equal(now_keys[0], keys[0])
    assert all(t.isfinite().all() for t in (*now_queries[1:], *now_keys))
    assert not torch.equal(now_queries[1], queries[1])


def test_a_step_clips_and_one_that_is_held_back_does_not() -> None:
    model, rows = gpt2(), batch()
    threshold = float(exact_maxima(model, "gpt2", rows).max()) / 2
    maxima = AttentionMaxima(model)
    optimizer = build_optimizer(model, lr=0.0)
    QKClip(maxima.attentions, maxima.take, threshold=threshold).attach(optimizer)
    before = weights_of(model)
    maxima.start()
    model(**rows)
    optimizer.step()  # no gradients
    assert all(torch.equal(before[n], value) for n, value in weights_of(model).items())
    assert maxima.read() == {}
    model(**rows, labels=rows["input_ids"]).loss.backward()
    optimizer.step()
    maxima.stop()
    after = exact_maxima(model, "gpt2", rows)
    assert float(after.max()) <= threshold * (1 + CLIPPED_TOLERANCE)


def test_a_step_that_a_scaler_skips_is_forgotten() -> None:
    model, rows = gpt2(), batch()
    maxima = AttentionMaxima(model)
    callback = MeasureAttention(maxima)
    optimizer = build_optimizer(model, lr=0.0)
    QKClip(maxima.attentions, maxima.take, threshold=1e-3).attach(optimizer)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    callback.on_train_begin()
    callback.on_step_begin()
    scaler.scale(model(**rows, labels=rows["input_ids"]).loss).backward()
    model.transformer.wte.weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert maxima.read()  # nobody took them
    callback.on_step_begin()
    assert maxima.read() == {}
    callback.on_train_end()
    assert all(torch.equal(before[n], value) for n, value in weights_of(model).items())


def test_weights_may_lie_elsewhere_than_maxima() -> None:
    """As where layers lie on several devices, or are offloaded."""
    model = llama().to("meta")
    maxima = AttentionMaxima(model)
    QKClip(maxima.attentions, maxima.take, threshold=1.0).clip_(torch.full((1, 4), 2.0))


def test_frozen_projections_are_refused() -> None:
    model = llama()
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    maxima = AttentionMaxima(model)
    with pytest.raises(ConfigurationError, match="frozen"):
        QKClip(maxima.attentions, maxima.take)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj"]])
def test_adapted_models_are_refused(targets: list[str]) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets))
    maxima = AttentionMaxima(model)
    with pytest.raises(ConfigurationError, match="under an adapter"):
        QKClip(maxima.attentions, maxima.take)


# ---- in a Trainer ----


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (24, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(folder: Path, words: str, **options: Any) -> Any:
    chosen = {"pss_optim": "normuon", "pss_optim_args": f"dtype=float32,{words}"}
    defaults = {"model": gpt2(), "save_strategy": "no", "max_steps": 6}
    return make_trainer(
        folder,
        trainer_class=PSSTrainer,
        cls=PSSTrainingArguments,
        rows=examples(),
        **{**defaults, **chosen, **options},
    )


def run(folder: Path, words: str, **options: Any) -> Any:
    trainer = trainer_of(folder, words, **options)
    trainer.train()
    return trainer


def largest_difference(one: Any, other: Any) -> float:
    pairs = zip(weights_of(one.model).values(), weights_of(other.model).values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_without_heads_above_the_threshold_training_keeps_its_bits(tmp_path: Path) -> None:
    own = AttentionInterface.get_interface
    plain, high, off = (
        run(tmp_path / str(i), words) for i, words in enumerate(("", "qk_clip=1e6", "qk_clip=0"))
    )
    assert largest_difference(plain, high) == largest_difference(plain, off) == 0.0
    assert AttentionInterface.get_interface is own
    assert "pss/clipped_heads" not in off.state.log_history[0]
    assert high.state.log_history[0]["pss/clipped_heads"] == 0.0


def test_a_trainer_clips_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One step that moves nothing by itself: heads end at the threshold."""
    data = examples()
    rows = {"input_ids": torch.stack([row["input_ids"] for row in data])}
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    before = exact_maxima(gpt2(), "gpt2", rows)
    threshold = float(before.sort().values[1:3].mean())  # two heads above, two below
    options = {"max_steps": 1, "per_device_train_batch_size": len(data), "learning_rate": 0.0}
    with caplog.at_level(logging.INFO, "hf_pss.trainer.chosen_optimizer"):
        trainer = run(tmp_path, f"qk_clip={threshold}", **options)
    after = exact_maxima(trainer.model, "gpt2", rows)
    assert far(after, before.clamp(max=threshold)) <= CLIPPED_TOLERANCE
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert far(torch.tensor(line["pss/max_attention_logit"]), before.max()) <= MAXIMUM_TOLERANCE
    assert line["pss/clipped_heads"] == 2.0
    (said,) = [r.getMessage() for r in caplog.records if "qk_clip keeps" in r.getMessage()]
    assert "in 1 modules, transformer.h.0.attn" in said


# The new name came after the oldest release that we support.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointing_changes_nothing(is_reentrant: bool, tmp_path: Path) -> None:
    """What is recomputed is the same; what ran without gradients is not looked at."""
    plain = run(tmp_path / "plain", "qk_clip=1")
    model = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    again = run(tmp_path / "again", "qk_clip=1", model=model)
    assert model.is_gradient_checkpointing
    assert largest_difference(plain, again) == 0.0
    assert [line.get("pss/clipped_heads") for line in plain.state.log_history] == [
        line.get("pss/clipped_heads") for line in again.state.log_history
    ]
    assert plain.state.log_history[0]["pss/clipped_heads"] > 0


def test_accumulation_is_one_step(tmp_path: Path) -> None:
    still = {"learning_rate": 0.0, "max_steps": 3}  # nothing but the clip moves a weight
    whole = run(tmp_path / "whole", "qk_clip=1", **still)
    micro = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    divided = run(tmp_path / "divided", "qk_clip=1", **still, **micro)
    assert largest_difference(whole, divided) <= ACCUMULATED_DRIFT
    assert largest_difference(whole, run(tmp_path / "off", "", **still)) > ACCUMULATED_DRIFT


class Breaks(TrainerCallback):
    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")


def test_a_run_that_breaks_off_leaves_nothing_behind(tmp_path: Path) -> None:
    own = AttentionInterface.get_interface
    trainer = trainer_of(tmp_path, "qk_clip=1", gradient_accumulation_steps=4)
    trainer.add_callback(Breaks())
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert AttentionInterface.get_interface is own


def test_a_new_model_lets_the_earlier_one_go(tmp_path: Path) -> None:
    args = arguments(tmp_path, pss_optim="muon", pss_optim_args="qk_clip=1", save_strategy="no")
    trainer: Any = PSSTrainer(model_init=lambda: gpt2(), args=args, train_dataset=examples())

    def meters() -> list[MeasureAttention]:
        held = trainer.callback_handler.callbacks
        return [callback for callback in held if isinstance(callback, MeasureAttention)]

    trainer.train()
    (meter,) = meters()
    first = weakref.ref(meter)
    del meter
    trainer.train()
    gc.collect()
    assert len(meters()) == 1
    assert first() is None


def test_amuse_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        trainer_class=PSSTrainer,
        cls=PSSTrainingArguments,
        pss_optim="amuse",
        pss_optim_args="qk_clip=100",
        lr_scheduler_type="constant",
    )
    with pytest.raises(ConfigurationError, match="amuse keeps an average"):
        trainer.train()
