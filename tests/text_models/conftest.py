"""Tiny real checkpoints with random weights, made on the spot: nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a vector database keeps vectors near their rows and finds the nearest ones",
    "Zürich naïve café, piñata! 3.14159 (and more)",
    "models read tokens; tokens make words; words make sentences",
]
SIZES = {"hidden": 32, "layers": 2, "heads": 4, "positions": 66}
# Families that call their sizes otherwise.
OWN_NAMES: dict[str, dict[str, Any]] = {
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip
# Which special tokens a family of models has, and how it frames a text.
BERT_LIKE = ("bert", "distilbert", "electra", "mpnet", "modernbert")


def _tokenizer(kind: str, frame: bool) -> Any:
    """A tokenizer of the family's sort, trained on CORPUS; `frame` adds its special tokens."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    names = {
        "unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }  # fmt: skip
    if kind not in BERT_LIKE:
        names = {
            "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
            "mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>",
        }  # fmt: skip
    special = list(dict.fromkeys(names.values()))
    trainer: Any
    if kind in BERT_LIKE:
        fast = Tokenizer(models.WordPiece(unk_token=names["unk_token"]))
        fast.normalizer = normalizers.BertNormalizer(lowercase=True)
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=special, show_progress=False
        )
    elif kind == "xlm-roberta":
        fast = Tokenizer(models.Unigram())
        fast.normalizer = normalizers.NFKC()
        fast.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        fast = Tokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    fast.train_from_iterator(CORPUS * 4, trainer)
    start, end = names["cls_token"], names["sep_token"]
    if frame:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}",
            pair=f"{start} $A {end} $B:1 {end}:1",
            special_tokens=[(name, fast.token_to_id(name)) for name in (start, end)],
        )
    inputs = ["input_ids", "attention_mask"]
    if kind in ("bert", "electra"):
        inputs.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(tokenizer_object=fast, model_input_names=inputs, **names)


def _config(kind: str, tokenizer: Any, **options: Any) -> Any:
    from transformers import AutoConfig

    h, layers, heads = SIZES["hidden"], SIZES["layers"], SIZES["heads"]
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": SIZES["positions"],
    }
    sizes: dict[str, Any]
    if kind in OWN_NAMES:
        sizes = OWN_NAMES[kind]
        if "n_positions" in sizes or kind in ("t5", "xlnet"):
            del common["max_position_embeddings"]
    else:
        sizes = {
            "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 64,
        }  # fmt: skip
    if kind == "electra":
        sizes["embedding_size"] = 24
    return AutoConfig.for_model(kind, **{**common, **sizes, **options})


class Checkpoints:
    """Makes model folders; the same arguments give the same folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def transformer(
        self, kind: str = "bert", seed: int = 0, frame: bool = True, **options: Any
    ) -> Path:
        """A plain transformers model: weights, configuration and tokenizer."""
        import torch
        from transformers import AutoModel

        folder = self._folder("plain", kind, seed, frame, options)
        if folder.is_dir():
            return folder
        torch.manual_seed(seed)
        tokenizer = _tokenizer(kind, frame)
        model = AutoModel.from_config(_config(kind, tokenizer, **options)).eval()
        for name, weight in model.named_parameters():
            # what is trained is neither zero nor one
            if "norm" in name.lower() or name.endswith("bias"):
                weight.data.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.data.normal_(std=0.3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def sentence(
        self,
        kind: str = "bert",
        pooling: str | tuple[str, ...] = "mean",
        dense: int | None = None,
        normalize: bool = False,
        prompts: dict[str, str] | None = None,
        max_seq_length: int | None = 40,
        seed: int = 0,
        frame: bool = True,
        extra: tuple[str, ...] = (),
        **options: Any,
    ) -> Path:
        """A sentence-transformers model; `extra` names more modules, such as ``"LayerNorm"``."""
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules

        parts = (pooling, dense, normalize, prompts, max_seq_length, frame, extra, options)
        folder = self._folder("sentence", kind, seed, parts)
        if folder.is_dir():
            return folder
        plain = self.transformer(kind, seed, frame, **options)
        torch.manual_seed(seed)
        first = modules.Transformer(str(plain), max_seq_length=max_seq_length)
        chain: list[Any] = [first, modules.Pooling(SIZES["hidden"], pooling)]
        width = chain[1].get_embedding_dimension()
        if dense is not None:
            chain.append(modules.Dense(width, dense))
            width = dense
        if "LayerNorm" in extra:
            chain.append(modules.LayerNorm(width))
        if normalize:
            chain.append(modules.Normalize())
        library = SentenceTransformer(modules=chain, device="cpu", prompts=prompts)
        library.save(str(folder), create_model_card=False)
        return folder

    def _folder(self, *parts: Any) -> Path:
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return self.root / f"{parts[0]}-{parts[1]}-{key}"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes tiny model folders, once for all tests."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))
