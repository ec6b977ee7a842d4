"""What runs in the processes that speed.py times: each side of a comparison, with the same methods."""
import os
import re
import resource
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "docs")        # nanollm is run from its folder
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
CLIP_NORM = 1.0


def timed(f):
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def peak():
    """The most resident memory of this process, in bytes. What n processes share counts as 1/n, by what they share now.
    (ru_maxrss would include the parent's.)
    """
    if not Path("/proc/self/smaps_rollup").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    most, now, shared = (int(re.search(rf"{name}:\s*(\d+) kB", text)[1]) for name in ("VmHWM", "VmRSS", "Pss"))
    return 1024 * (most - now + shared)


class Side:
    """One training of the checkpoint in `folder`; a subclass provides load, loss, step and save."""

    def __init__(self, c, args, folder, variant=False):
        self.c, self.seed, self.gpu, self.tf32 = c, args.seed, args.device == "gpu", args.dtype == "tf32"
        self.dtype, self.processes = "float32" if self.tf32 else args.dtype, args.processes
        self.wait = lambda: None                    # load replaces it on a GPU
        self.load(folder, args.threads, variant)

    def batch(self, step):
        """ids, targets (B, T) of a step, the same on every side; word n is 1/n as frequent as word 1, as in a text."""
        u = np.random.default_rng([self.seed, step]).random((self.c["batch_size"], self.c["max_context"] + 1))
        ids = ((self.c["vocab_size"] + 1) ** u).astype(np.int64) - 1
        return ids[:, :-1], ids[:, 1:]

    def first_loss(self):
        return self.loss(*self.batch(0)).item()

    def steps(self, first, count):
        """(seconds, None) of `count` steps, each on a new batch; the batches are drawn before the clock starts."""
        batches = [self.batch(step) for step in range(first, first + count)]
        self.wait()
        seconds, _ = timed(lambda: ([self.step(*batch) for batch in batches], self.wait()))
        return seconds, None

    def facts(self):
        """(threads, peak bytes): reserved GPU memory, or resident memory."""
        return self.threads, self.reserved() if self.gpu else peak()


class Nanollm(Side):
    """args.processes take their share of each step, as in train.py."""

    def load(self, folder, threads, recompute):
        from console import cli
        from hardware import device, local, ranks
        device.use("gpu" if self.gpu else "cpu", self.tf32)
        self.threads = device.threads
        kind, config = self.kind()
        self.model = kind.load(folder) if folder else kind(config, seed=self.seed)
        plan = Namespace(processes=self.processes, n_weight=self.model.weights.flat.size, dtype=self.dtype,
                         recompute=recompute, make=partial(kind, self.model.config, seed=None))
        self.team = ranks.ALONE
        if plan.processes > 1:
            self.others = local.started(cli.run, (serve, plan, self.gpu, self.tf32))
            self.team, _ = self.others.__enter__()      # until this process ends, and they with it
            device.use("gpu" if self.gpu else "cpu", self.tf32, self.team)
        self.train = Training(self.model, plan, self.team)
        if self.gpu:
            self.wait = device.xp.cuda.Device().synchronize
            self.reserved = device.xp.get_default_memory_pool().total_bytes
        self.save = self.model.save

    def kind(self):
        """(the model's class, its Config)"""
        from nanollm import Config, NanoLLM
        return NanoLLM, Config(**{name: value for name, value in self.c.items() if name != "batch_size"})

    def flops_per_token(self):
        from console import metrics
        return metrics.flops_per_token(self.model.config, self.c["max_context"])

    def loss(self, ids, targets):
        """Of all windows on rank 0, where a step takes only its share: nothing is kept, lest it be this side's peak."""
        from autograd import no_grad
        with no_grad():
            return self.model.loss(ids, targets).data

    def step(self, *batch):
        self.team.exchange(batch)
        self.train.step(*batch)

    def facts(self):
        if self.gpu:
            return super().facts()
        self.team.exchange(None)
        return self.threads, self.team.sum(peak())

    def generate(self, prompt, count):
        return timed(lambda: list(self.model.generate(prompt, count, temperature=0)))


class Training:
    """One rank's training of a model."""

    def __init__(self, model, plan, team):
        from train import Adam, clipping, loss_and_norm
        self.model, self.team, self.loss_and_norm, self.clipping = model, team, loss_and_norm, clipping
        team.adopt(model.weights)
        self.adam = Adam(model, **ADAM)
        model.recompute = plan.recompute
        model.compute_dtype, self.loss_scale = np.dtype(plan.dtype), 2.0 ** 16 if plan.dtype == "float16" else 1.0

    def step(self, ids, targets):
        self.adam.zero_grad()
        total = 0.0
        for first, size in self.team.share(0, len(ids), len(ids)):
            own = slice(first, first + size)
            loss = self.model.loss(ids[own], targets[own])
            loss.backward(self.loss_scale * size / len(ids))
            total = total + loss.data * (size / len(ids))
        loss, norm = self.loss_and_norm(self.model, total, self.team)
        self.adam.step(scale=self.clipping(loss, norm, CLIP_NORM, self.loss_scale))
        self.team.share_weights()


def serve(plan, team):
    """What the other ranks do: steps of the batches that rank 0 sends, and None for the memory that was used."""
    training = Training(plan.make(), plan, team)
    while True:
        batch = team.exchange()[0]
        if batch:
            training.step(*batch)
        else:
            team.sum(peak())


class PyTorch(Side):
    def load(self, folder, threads, compiled):
        import torch
        from safetensors.torch import load_file, save_file
        from torch_llama import Llama
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        self.torch, self.threads, self.where = torch, torch.get_num_threads(), "cuda" if self.gpu else "cpu"
        if self.gpu:
            self.wait, self.reserved = torch.cuda.synchronize, torch.cuda.max_memory_reserved
        model = Llama(self.c).to(self.where)
        tensors = model.hf_tensors()
        for name, tensor in load_file(Path(folder, "model.safetensors")).items():
            tensors[name].copy_(tensor)
        self.save = lambda folder: save_file({name: t.cpu().contiguous() for name, t in tensors.items()},
                                             Path(folder, "model.safetensors"))
        self.parameters, self.model = list(model.parameters()), torch.compile(model) if compiled else model
        self.adam = torch.optim.Adam(self.parameters, fused=True, **ADAM)
        self.scaler = torch.amp.GradScaler(self.where, enabled=self.dtype == "float16")

    def loss(self, ids, targets):
        with self.torch.autocast(self.where, getattr(self.torch, self.dtype), enabled=self.dtype != "float32"):
            return self.model(*(self.torch.from_numpy(a).to(self.where) for a in (ids, targets)))

    def step(self, ids, targets):
        self.scaler.scale(self.loss(ids, targets)).backward()
        self.scaler.unscale_(self.adam)
        self.torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM, foreach=True)
        self.scaler.step(self.adam)
        self.scaler.update()
        self.adam.zero_grad()


class Pictures(Side):
    """Batches of pictures as smooth as photographs: of noise, one pooling in a million is so nearly a tie that rounding
    decides it, and its gradient goes elsewhere.
    """
    def batch(self, step):
        """pixels (B, S, S, 3) from 0 to 255, labels (B,)"""
        from PIL import Image
        rng, size = np.random.default_rng([self.seed, step]), (self.c["size"],) * 2
        coarse = rng.integers(0, 256, (self.c["batch_size"], 8, 8, 3), np.uint8)
        pixels = np.stack([Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in coarse])
        return pixels, rng.integers(0, self.c["classes"], len(pixels))


class NanollmPictures(Pictures, Nanollm):
    def kind(self):
        from images.network import Config, ConvNet
        return ConvNet, Config(tuple(map(str, range(self.c["classes"]))), self.c["size"])

    def flops_per_token(self):
        return self.model.config.flops_per_picture()


class PyTorchPictures(Pictures):
    def load(self, folder, threads, channels_last):
        import torch
        from safetensors.torch import load_file, save_file
        from torch import nn
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        self.torch, self.threads, self.where = torch, torch.get_num_threads(), "cuda" if self.gpu else "cpu"
        if self.gpu:
            self.wait, self.reserved = torch.cuda.synchronize, torch.cuda.max_memory_reserved
        layers = []
        for C, F in ((3, 16), (16, 32), (32, 64), (64, 128)):
            layers += nn.Conv2d(C, F, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        classifier = nn.Linear(128, self.c["classes"])
        self.model = nn.ModuleDict({"features": nn.Sequential(*layers), "classifier": classifier})
        self.model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(self.where, memory_format=self.format)
        tensors = self.model.state_dict()
        self.save = lambda folder: save_file({name: t.cpu().contiguous() for name, t in tensors.items()},
                                             Path(folder, "model.safetensors"))
        self.adam = torch.optim.Adam(self.model.parameters(), fused=True, **ADAM)
        self.mean, self.std = (torch.tensor(x, device=self.where).reshape(3, 1, 1)
                               for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def loss(self, pixels, labels):
        x, y = (self.torch.from_numpy(array).to(self.where) for array in (pixels, labels))
        x = ((x.permute(0, 3, 1, 2) / 255 - self.mean) / self.std).contiguous(memory_format=self.format)
        logits = self.model["classifier"](self.model["features"](x).mean((2, 3)))
        return self.torch.nn.functional.cross_entropy(logits, y)

    def step(self, pixels, labels):
        self.loss(pixels, labels).backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM, foreach=True)
        self.adam.step()
        self.adam.zero_grad()


class Transformers:
    def __init__(self, args, folder):
        import torch
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        torch.set_num_threads(args.threads)
        self.torch, self.where = torch, "cuda" if args.device == "gpu" else "cpu"
        self.model = LlamaForCausalLM.from_pretrained(folder).to(self.where).eval()

    def generate(self, prompt, count):
        ids = self.torch.tensor([prompt], device=self.where)
        options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
        with self.torch.inference_mode():
            seconds, out = timed(lambda: self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), **options).tolist())
        return seconds, out[0][len(prompt):]


class Text:
    """Tokenisation of a file: by nanollm into a new cache, or by `tokenizers`, whole or line by line on all threads."""

    def __init__(self, way, text, tokenizer):
        self.way, self.text, self.tokenizer = way, text, tokenizer

    def encode(self, cache):
        from tokenizers import Tokenizer

        import data
        os.environ["NANOLLM_CACHE"] = os.path.join(cache, str(os.getpid()))      # no side finds the ids of another
        encoder = Tokenizer.from_file(self.tokenizer)
        read = lambda: Path(self.text).read_text("utf-8")
        return timed({"nanollm": lambda: data.TokenDataset.from_text(self.text, self.tokenizer, 128).tokens.tolist(),
                      "whole": lambda: encoder.encode(read()).ids,
                      "lines": lambda: [i for line in encoder.encode_batch_fast(read().splitlines(keepends=True))
                                        for i in line.ids]}[self.way])


class Gemm:
    def __init__(self, args):
        import torch
        torch.set_num_threads(args.threads)
        torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
        self.torch, self.gpu = torch, args.device == "gpu"
        self.dtype = getattr(torch, args.dtype) if self.gpu and args.dtype != "tf32" else torch.float32

    def rates(self):
        """{library: FLOP/s of the fastest of ten large products}, with all threads; on a GPU in this dtype."""
        n = 8192 if self.gpu else 2048
        a = self.torch.rand(n, n, device="cuda" if self.gpu else "cpu", dtype=self.dtype)
        products = {"torch": lambda: (a @ a, self.gpu and self.torch.cuda.synchronize())}
        if not self.gpu:
            products["numpy"] = lambda: a.numpy() @ a.numpy()
        return {name: 2 * n ** 3 / min(timed(product)[0] for _ in range(10)) for name, product in products.items()}
