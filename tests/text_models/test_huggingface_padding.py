"""Where padding changes nothing: each kind of model that is run in padded batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gpu_lance.embeddings.plain_models import PADDED_TYPES, OwnForward
from gpu_lance.embeddings.pooling import pool_padded
from gpu_lance.embeddings.tokens import Tokens
from gpu_lance.errors import EmbeddingError

CPU = torch.device("cpu")
LENGTHS = np.array([40, 39, 21, 21, 7, 3, 2, 1])
VOCABULARY = 50

PLAIN: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66,
}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
PARTS = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
STACKS = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SIZES: dict[str, dict[str, Any]] = {
    "deberta": {**PLAIN, **RELATIVE},
    "deberta-v2": {**PLAIN, **RELATIVE, "position_buckets": 16},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": {**PLAIN, "embedding_size": 24},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
        "num_heads": 4, "window_size": 8,
    },
    "opt": {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip
SIZES |= dict.fromkeys(("bart", "m2m_100", "marian", "mbart", "plbart"), PARTS)
SIZES |= dict.fromkeys(("mt5", "t5", "umt5"), STACKS)
SIZES |= dict.fromkeys(
    "gemma gemma2 gemma3_text granite llama ministral mistral olmo phi3 qwen2 qwen3 smollm3 "
    "starcoder2".split(),
    GROUPED,
)


def model_of(kind: str) -> Any:
    """A tiny model with random weights that are neither zero nor one."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **SIZES.get(kind, PLAIN),
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            weight.data.add_(torch.randn_like(weight) * 0.2)
        else:
            weight.data.normal_(std=0.3)
    return model.get_encoder() if kind in ("m2m_100", "marian", "mt5", "t5", "umt5") else model


def tokens_of(lengths: np.ndarray) -> Tokens:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, lengths.sum()).astype(np.int32)
    return Tokens(ids, np.concatenate(([0], np.cumsum(lengths))))


@pytest.mark.parametrize("kind", sorted(PADDED_TYPES))
def test_a_padded_text_has_the_vector_of_the_text_by_itself(kind):
    model, tokens = model_of(kind), tokens_of(LENGTHS)
    states = []
    with torch.inference_mode():
        for ids in np.split(tokens.ids.astype(np.int64), tokens.offsets[1:-1]):
            inputs = torch.from_numpy(ids)[None]
            states.append(model(input_ids=inputs).last_hidden_state[0].float())
        padded = OwnForward(model, CPU, kind, pads=True)
        grouped = OwnForward(model, CPU, kind, pads=False)
        for pooling, one in (
            ("mean", lambda state: state.mean(0)),
            ("cls", lambda state: state[0]),
            ("lasttoken", lambda state: state[-1]),
        ):
            wanted = torch.stack([one(state) for state in states])
            for made in (padded(tokens, pooling), grouped(tokens, pooling)):
                assert made.dtype == torch.float32
                torch.testing.assert_close(made, wanted, atol=2e-5, rtol=1e-4)


def test_what_stands_in_the_padding_does_not_count():
    states = torch.tensor([[[1.0], [3.0]], [[4.0], [float("inf")]]])
    for pooling, wanted in (("mean", [2, 4]), ("cls", [1, 4]), ("lasttoken", [3, 4])):
        made = pool_padded(states, np.array([2, 1]), pooling)
        assert made.flatten().tolist() == wanted
    with pytest.raises(ValueError, match="Unknown pooling mode 'max'"):
        pool_padded(states, np.array([2, 1]), "max")


def test_a_token_that_the_model_does_not_know_is_an_error():
    tokens = Tokens(np.array([3, VOCABULARY], np.int32), np.array([0, 2]))
    with pytest.raises(EmbeddingError, match="token 50, but the model knows only 50"):
        OwnForward(model_of("albert"), CPU, "m", pads=True)(tokens, "mean")
