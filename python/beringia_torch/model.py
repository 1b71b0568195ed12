"""Causal language models: tokens to logits.

Llama is written here in plain torch, with the parameter names and the arithmetic of `transformers.LlamaForCausalLM`: a
block is `x + O·attention(rope(Q·norm(x)), rope(K·norm(x)), V·norm(x))`, then `x + D·(silu(G·norm(x)) ⊙ U·norm(x))`.
Every other family comes from `transformers`, which is imported only then.

Shape suffixes: b samples, t positions, h hidden, a query heads, g key and value heads, d head size, v vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import EngineError, shape_error
from .protocol import Request

#: As the agent's own bounds: a hostile config must not ask for more memory than any machine has.
VOCABULARY_MAX = 1 << 24
HIDDEN_MAX = 1 << 20
INTERMEDIATE_MAX = 1 << 22
LAYERS_MAX = 1 << 12
HEADS_MAX = 1 << 14
POSITIONS_MAX = 1 << 24
PARAMETERS_MAX = 1 << 40

#: Keys of a config that nothing is to be done about. Code that one names is neither fetched nor run: its implementation
#: of attention or of experts may be the name of a repository. A checkpoint's storage precision is not that of the
#: master weights.
IGNORED_KEYS = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "quantization_config",
    }
)

#: What draws random numbers into a tensor that is there, in `torch.nn.init` and as methods.
RANDOM_FILLS = frozenset({"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "exponential_", "bernoulli_"})


@dataclass(frozen=True)
class LlamaConfig:
    """The part of a Hugging Face `config.json` of a Llama that its arithmetic depends on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict[str, Any]
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float

    @staticmethod
    def parse(config: dict[str, Any]) -> LlamaConfig:
        """Reads a config; what it leaves out is as `transformers` has it, what this model cannot do is refused."""
        for key, only in [("hidden_act", "silu"), ("attention_dropout", 0), ("pretraining_tp", 1)]:
            if config.get(key, only) not in (only, None):
                raise shape_error("config.json", f"{key} is {config[key]!r}, this Llama has {only!r} only")
        heads = _size(config, "num_attention_heads", HEADS_MAX, 32)
        hidden = _size(config, "hidden_size", HIDDEN_MAX, 4096)
        if config.get("head_dim") is None and hidden % heads != 0:
            raise shape_error("config.json", f"{heads} heads do not divide hidden_size {hidden}")
        shape = LlamaConfig(
            vocab_size=_size(config, "vocab_size", VOCABULARY_MAX, 32000),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size", INTERMEDIATE_MAX, 11008),
            num_hidden_layers=_size(config, "num_hidden_layers", LAYERS_MAX, 32),
            num_attention_heads=heads,
            num_key_value_heads=_size(config, "num_key_value_heads", HEADS_MAX, heads),
            head_dim=_size(config, "head_dim", HIDDEN_MAX, hidden // heads),
            max_position_embeddings=_size(config, "max_position_embeddings", POSITIONS_MAX, 2048),
            rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
            rope=_rope_parameters(config),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            initializer_range=_positive(config, "initializer_range", 0.02),
        )
        if heads % shape.num_key_value_heads != 0:
            reason = f"{shape.num_key_value_heads} key and value heads do not divide {heads} heads"
            raise shape_error("config.json", reason)
        if shape.head_dim % 2 != 0:
            raise shape_error("config.json", f"a head of {shape.head_dim} cannot be turned in pairs")
        if shape.parameter_count > PARAMETERS_MAX:
            raise shape_error("config.json", f"{shape.parameter_count} parameters, at most {PARAMETERS_MAX}")
        return shape

    @property
    def parameter_count(self) -> int:
        """Parameters without biases."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return tables + self.num_hidden_layers * block + self.hidden_size


def _size(config: dict[str, Any], key: str, maximum: int, default: int) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
        raise shape_error("config.json", f"{key} is {str(value)[:40]}, not a whole number in 1 to {maximum}")
    return value


def _positive(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise shape_error("config.json", f"{key} is {str(value)[:40]}, not a positive number")
    return float(value)


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise shape_error("config.json", f"{key} is {str(value)[:40]}, not true or false")
    return value


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of newer configs, or `rope_theta` beside `rope_scaling` of older ones, as one object."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise shape_error("config.json", f"rope parameters are {str(found)[:40]}, not an object")
    rope_type = found.get("rope_type") or found.get("type") or "default"
    merged = {"rope_theta": config.get("rope_theta"), **found}
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": _positive(merged, "rope_theta", 10_000.0)}
    wanted = {
        "default": [],
        "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    }
    if not isinstance(rope_type, str) or rope_type not in wanted:
        raise shape_error("config.json", f"rope_type {str(rope_type)[:40]!r} is not one of {', '.join(wanted)}")
    for key in wanted[rope_type]:
        if key not in found:
            raise shape_error("config.json", f"rope_type {rope_type} needs {key}")
        rope[key] = _positive(found, key, 1.0)
    return rope


def inverse_frequencies(rope: dict[str, Any], head_size: int) -> torch.Tensor:
    """θ^(−2i/d) for each pair i, in f32, scaled for contexts longer than those of the first training."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float) / head_size
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between interpolated by wavelength."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / rope["factor"], frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * slowed / rope["factor"] + smooth * slowed
    is_between = ~(wavelengths < context / high) & ~(wavelengths > context / low)
    return torch.where(is_between, between, slowed)


def _linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """Without PyTorch's own first values, which `Llama` replaces."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)


class RmsNorm(nn.Module):
    """x / √(mean(x²) + ε) ⊙ w (Zhang and Sennrich 2019, equation 4), in f32 whatever comes in."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the last dimension."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.epsilon)


def rotate(x_bntd: torch.Tensor, cosine_td: torch.Tensor, sine_td: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + d/2): Hugging Face's half-split convention."""
    first, second = x_bntd.chunk(2, -1)
    return x_bntd * cosine_td + torch.cat((-second, first), -1) * sine_td


class Attention(nn.Module):
    """Causal attention; groups of query heads share a key and value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = _linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = _linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = _linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = _linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.head_size = config.head_dim
        self.repeat = config.num_attention_heads // config.num_key_value_heads

    def forward(self, x_bth: torch.Tensor, cosine_td: torch.Tensor, sine_td: torch.Tensor) -> torch.Tensor:
        """`[b, t, h]` to the same."""
        samples, positions, _ = x_bth.shape
        split = (samples, positions, -1, self.head_size)
        q_batd = rotate(self.q_proj(x_bth).view(split).transpose(1, 2), cosine_td, sine_td)
        k_bgtd = rotate(self.k_proj(x_bth).view(split).transpose(1, 2), cosine_td, sine_td)
        v_bgtd = self.v_proj(x_bth).view(split).transpose(1, 2)
        # The rotation is f32; under autocast the products go on in the precision of the projections.
        q_batd, k_bgtd = q_batd.to(v_bgtd.dtype), k_bgtd.to(v_bgtd.dtype)
        k_batd, v_batd = self._share(k_bgtd), self._share(v_bgtd)
        mixed_batd = F.scaled_dot_product_attention(q_batd, k_batd, v_batd, is_causal=True)
        return self.o_proj(mixed_batd.transpose(1, 2).reshape(samples, positions, -1))

    def _share(self, x_bgtd: torch.Tensor) -> torch.Tensor:
        """Each head `repeat` times in a row: not every maker's attention takes groups."""
        return x_bgtd if self.repeat == 1 else x_bgtd.repeat_interleave(self.repeat, dim=1)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_bth: torch.Tensor) -> torch.Tensor:
        """`[b, t, h]` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x_bth)) * self.up_proj(x_bth))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_bth: torch.Tensor, cosine_td: torch.Tensor, sine_td: torch.Tensor) -> torch.Tensor:
        """`[b, t, h]` to the same."""
        x_bth = x_bth + self.self_attn(self.input_layernorm(x_bth), cosine_td, sine_td)
        return x_bth + self.mlp(self.post_attention_layernorm(x_bth))


class Decoder(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.utils.skip_init(nn.Embedding, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        """Ids to the normalised residual stream `[b, t, h]`."""
        cosine_td, sine_td = self._turns(tokens_bt.shape[1])
        x_bth = self.embed_tokens(tokens_bt)
        for layer in self.layers:
            x_bth = layer(x_bth, cosine_td, sine_td)
        return self.norm(x_bth)

    def _turns(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.inverse_frequencies
        angles_tp = torch.outer(torch.arange(positions, device=frequencies.device, dtype=torch.float), frequencies)
        angles_td = torch.cat((angles_tp, angles_tp), -1)
        return angles_td.cos(), angles_td.sin()


class Llama(nn.Module):
    """Tokens `[b, t]` to logits `[b, t, v]`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = _linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        """Causal: the logits at a position depend on tokens up to it."""
        return self.lm_head(self.model(tokens_bt))


class FromTransformers(nn.Module):
    """Any causal language model of `transformers`, called as `Llama` is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        """Tokens `[b, t]` to logits `[b, t, v]`."""
        return self.inner(input_ids=tokens_bt, use_cache=False).logits


@dataclass(frozen=True)
class CausalModel:
    """A model and what requests are checked against."""

    module: nn.Module
    vocabulary: int
    #: Longest sequence; None where the family has no limit.
    positions_max: int | None
    #: Version of `transformers` where the model comes from there.
    transformers: str | None = None

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names as in a checkpoint, tied tensors once."""
        inner = self.module.inner if isinstance(self.module, FromTransformers) else self.module
        return list(inner.named_parameters())


def build(config: Request, seed: int | None) -> CausalModel:
    """The model of a Hugging Face config, on the CPU, in f32, initialised as its family does.

    Without a seed random weights are zero: they are about to be replaced, and drawing a large model's takes minutes.
    """
    fields = config.as_dict()
    model_type = config.text("model_type")
    with torch.random.fork_rng(devices=[]), _ZeroInsteadOfRandom() if seed is None else contextlib.nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        if model_type == "llama":
            parsed = LlamaConfig.parse(fields)
            return CausalModel(Llama(parsed), parsed.vocab_size, parsed.max_position_embeddings)
        return _from_transformers(model_type, fields)


class _ZeroInsteadOfRandom(TorchFunctionMode):
    """Fills in place with zeros what would be filled with random numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sees `torch.nn.init` as well as the methods of a tensor."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM_FILLS:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


def _without(fields: Any, ignored: frozenset[str]) -> Any:
    """The same without these keys, however deep."""
    if isinstance(fields, dict):
        return {key: _without(value, ignored) for key, value in fields.items() if key not in ignored}
    return [_without(value, ignored) for value in fields] if isinstance(fields, list) else fields


def _from_transformers(model_type: str, fields: dict[str, Any]) -> CausalModel:
    try:
        import transformers
    except ImportError as error:
        reason = f"model_type {model_type} comes from transformers, which cannot be imported: {error}"
        install = f"{sys.executable or 'python3'} -m pip install transformers"
        raise EngineError("missing", "transformers", reason, install=install) from None
    chosen = {key: value for key, value in _without(fields, IGNORED_KEYS).items() if key != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(model_type, **chosen)
        inner = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - every family refuses a config in its own way
        raise shape_error("config.json", f"transformers {transformers.__version__} refuses it: {error}") from None
    text = config.get_text_config()
    # Dropout is off: a run that is resumed or moved to another engine must continue with the same numbers.
    inner.eval()
    positions_max = getattr(text, "max_position_embeddings", None)
    return CausalModel(FromTransformers(inner), text.vocab_size, positions_max, transformers.__version__)
