"""The contenders of bench_providers.py, each in a process of its own, and the model it adds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from text_sides import Job, table_adder


def bert_base(folder: Path, like: Path) -> Path:
    """Save a BERT of the size of bert-base with random weights, and the tokenizer of `like`."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


class Loads:
    """How often this process loaded a model, and the time of that, tokenizers too."""

    def __init__(self) -> None:
        import transformers

        self.models, self.cpu_s, self.wall_s, self._inside = 0, 0.0, 0.0, False
        for kind in (transformers.AutoModel, transformers.AutoTokenizer):
            self._watch(kind, kind is transformers.AutoModel)

    def _watch(self, kind: Any, counted: bool) -> None:
        load = kind.from_pretrained

        def watched(*args: Any, **kwargs: Any) -> Any:
            inside, self._inside = self._inside, True
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                return load(*args, **kwargs)
            finally:
                self._inside = inside
                if not inside:
                    self.models += counted
                    self.cpu_s += time.process_time() - cpu
                    self.wall_s += time.perf_counter() - wall

        kind.from_pretrained = watched

    def watch(self, add: Callable[..., Job]) -> Callable[..., Job]:
        """The same contender, which also says what it has loaded so far."""

        def watching(texts: list[str], **options: Any) -> Job:
            job = add(texts, **options)
            before = 0.0, 0.0

            def run() -> None:
                nonlocal before
                before = self.cpu_s, self.wall_s  # of the run alone: a new table loads too
                job.run()

            def more() -> dict[str, Any]:
                cpu, wall = self.cpu_s - before[0], self.wall_s - before[1]
                loads = {"loads": self.models, "load_cpu_s": cpu, "load_s": wall}
                return {**job.more(), **loads}

            return Job(run, job.vectors, more)

        return watching


def ours(folder: str, place: str, device: str) -> Callable[..., Job]:
    """This package: through a table, as bare embedding, and watched by torch's profiler."""
    from gpu_lance.device import resolve_device
    from gpu_lance.embeddings import get_registry
    from gpu_lance.types import Side

    made: dict[str, Any] = {}
    where = resolve_device(device)

    def wait() -> None:
        if where.type == "cuda":
            import torch

            torch.cuda.synchronize(where)

    def bare(function: Any, texts: list[str]) -> Job:
        found: dict[str, Any] = {}

        def run() -> None:
            start = time.perf_counter()
            ready = function.prepare(texts, Side.SOURCE)
            found["prepare_s"] = time.perf_counter() - start
            found["vectors"] = function.finish(ready, ndims=function.ndims(), device=where).vectors
            wait()

        return Job(run, lambda: found["vectors"].cpu().numpy(), lambda: without(found, "vectors"))

    def do(texts: list[str], provider: str = "huggingface", how: str = "add") -> Job:
        if provider not in made:
            function = get_registry().get(provider).create(name=folder, device=device)
            add = table_adder("gpu_lance", provider, folder, f"{place}/{provider}", device)
            made[provider] = function, add
        function, add = made[provider]
        if how == "bare":
            return bare(function, texts)
        return add(texts) if how == "add" else profiled(add(texts), wait)

    return do


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The other values."""
    return {key: value for key, value in values.items() if key != name}


def profiled(job: Job, wait: Callable[[], None]) -> Job:
    """The same job, which also says how long kernels ran, and which ones longest."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    name = "CUDA" if torch.cuda.is_available() else "CPU"
    activity, device = getattr(ProfilerActivity, name), getattr(DeviceType, name)
    found: dict[str, Any] = {}

    def run() -> None:
        with profile(activities=[activity]) as watch:
            start = time.perf_counter()
            job.run()
            wait()
            found["watched_s"] = time.perf_counter() - start
        events = [each for each in watch.key_averages() if each.device_type == device]
        kernels = [each for each in events if not each.key.startswith(("Memcpy", "Memset"))]
        kernels.sort(key=lambda each: -each.self_device_time_total)
        found["kernel_s"] = sum(each.self_device_time_total for each in kernels) / 1e6
        found["copy_s"] = sum(each.self_device_time_total for each in events) / 1e6
        found["copy_s"] -= found["kernel_s"]
        found["kernels"] = sum(each.count for each in kernels)
        found["longest"] = [
            (each.key[:80], each.count, round(each.self_device_time_total / 1e3, 1))
            for each in kernels[:8]
        ]

    return Job(run, job.vectors, lambda: {**job.more(), **found})


def library(folder: str, device: str) -> Callable[..., Job]:
    """Sentence-transformers alone, in bfloat16: no table. It sorts the texts itself."""
    import torch
    from sentence_transformers import SentenceTransformer

    kind = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = SentenceTransformer(folder, device=device, model_kwargs={"dtype": kind})

    def encode(texts: list[str], batch_size: int = 128) -> Job:
        made: list[Any] = []

        def run() -> None:
            made.append(
                model.encode(
                    texts, batch_size=batch_size, normalize_embeddings=True,
                    convert_to_tensor=True, show_progress_bar=False,
                )
            )  # fmt: skip
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        return Job(run, lambda: made[0].float().cpu().numpy())

    return encode


def contender(name: str, folder: str, place: str, device: str) -> Callable[..., Job]:
    """The contender of that name."""
    loads = Loads()
    if name == "gpu_lance":
        return loads.watch(ours(folder, place, device))
    if name == "lancedb":
        return loads.watch(table_adder(name, "huggingface", folder, place, device))
    return library(folder, device)
