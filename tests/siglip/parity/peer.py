"""The PyTorch side of these tests, a process in .venv/parity that answers requests with files.

Every line of stdin is a request, {"action": ..., **arguments}; the answer is one line of JSON, the
action's result or {"failed": traceback}. It imports nothing of ours, and pytest nothing of it.
"""

# pyright: reportMissingImports=false
# The peers are in another environment, see requirements-parity.txt.
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import traceback

import numpy as np

PACKAGES = ("torch", "torchvision", "transformers", "timm", "open_clip_torch")


def versions() -> dict[str, str]:
    """Raises ImportError where a peer is missing, or torch, which all need, does not load."""
    import torch  # noqa: F401

    return {package: importlib.metadata.version(package) for package in PACKAGES}


@functools.cache
def import_torchvision():
    """torchvision, which open_clip, timm and transformers import.

    Its wheels mostly are built for CUDA, and their compiled operators do not load beside a PyTorch
    without. No model here calls one, but the import stops at the first whose name is unknown: the
    two names that it needs are declared, without anything behind them. Returns what must live on.
    """
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        return torchvision, library
    return (torchvision,)


# The loss


def sigmoid_loss(inputs: str, out: str, processes: int, dist_impls: list[str]) -> None:
    """open_clip's SigLipLoss and its gradients over gloo processes, a connection for each run.

    Args:
      inputs: .npz with zimg, ztxt [N, d], t_prime, b; rows are split evenly over the processes.
      out: .npz to write: '<dist_impl> <dtype> <loss | zimg | ztxt | t_prime | b>'.
    """
    # The server imports PyTorch once and forks the ranks before it has any thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.nn"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (inputs, folder, processes, dist_impls)
        ranks = [
            context.Process(target=_rank, args=(rank, *arguments)) for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"exit codes of the ranks: {[rank.exitcode for rank in ranks]}")
        parts = [np.load(pathlib.Path(folder) / f"{rank}.npz") for rank in range(processes)]
        # DistributedDataParallel takes the mean of the ranks' losses, hence of their gradients.
        # A rank's own rows have a share in every rank's loss, and its autograd has summed them.
        whole = {}
        for name in parts[0].files:
            values = [part[name] for part in parts]
            is_rows = values[0].ndim > 0
            whole[name] = np.concatenate(values) / processes if is_rows else np.mean(values)
        np.savez(out, **whole)


def _rank(rank: int, inputs: str, folder: str, processes: int, dist_impls: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    SigLipLoss = _open_clip_loss().SigLipLoss
    if processes > 1:
        if sys.platform == "linux":  # whatever name and address this machine has
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        meeting = f"file://{folder}/meeting"
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=processes
        )
    given, found = np.load(inputs), {}
    n = len(given["zimg"]) // processes
    rows = slice(rank * n, (rank + 1) * n)
    for dist_impl in dist_impls:
        for dtype in (torch.float32, torch.float64):
            zimg, ztxt, t_prime, b = (
                torch.tensor(given[name][where], dtype=dtype, requires_grad=True)
                for name, where in (("zimg", rows), ("ztxt", rows), ("t_prime", ()), ("b", ()))
            )
            loss = SigLipLoss(rank=rank, world_size=processes, dist_impl=dist_impl)
            value = loss(zimg, ztxt, t_prime.exp(), b)
            value.backward()
            grads = (value.detach(), zimg.grad, ztxt.grad, t_prime.grad, b.grad)
            for name, x in zip(("loss", "zimg", "ztxt", "t_prime", "b"), grads):
                found[f"{dist_impl} {str(dtype).removeprefix('torch.')} {name}"] = x.numpy()
    np.savez(pathlib.Path(folder) / f"{rank}.npz", **found)
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _open_clip_loss():
    """open_clip/loss.py alone: importing the package takes each rank seconds."""
    package = importlib.util.find_spec("open_clip")
    file = pathlib.Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Models


def transformers_embed(
    folder: str, inputs: str, out: str, model: str, attention: str
) -> dict[str, list[str]]:
    """What a model of transformers makes of inputs.

    Args:
      model: a class of transformers, whose from_pretrained reads `folder`.
      inputs: .npz of what its forward takes.
      out: .npz to write, of what comes out: image_embeds, ..., or of a tower alone pooler_output
        and last_hidden_state.

    Returns:
      The names of arrays that the file did not have, that the model did not take, and that did
      not fit: 'missing', 'unexpected', 'mismatched'; and 'is', the class that came out.
    """
    import_torchvision()
    import torch
    import transformers

    net, loading = getattr(transformers, model).from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
    )
    output = _call(net, inputs)
    names = ("image_embeds", "text_embeds", "logits_per_image", "pooler_output")
    names += ("last_hidden_state",)
    np.savez(out, **{name: output[name].numpy() for name in names if name in output})
    keys = {kind: sorted(map(str, loading[f"{kind}_keys"])) for kind in LOADING}
    return {**keys, "is": [type(net).__name__]}


LOADING = ("missing", "unexpected", "mismatched")


def transformers_random(folder: str, model: str, config: dict, seed: int = 0) -> None:
    """A model of transformers, every array random, as its save_pretrained writes it."""
    import_torchvision()
    import torch
    import transformers

    kind = getattr(transformers, model)
    net = kind(kind.config_class(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, array in net.named_parameters():
            if name in ("logit_scale", "logit_bias"):
                array.fill_({"logit_scale": 4.7, "logit_bias": -12.0}[name])
            elif "norm" in name and name.endswith("weight"):
                array.normal_(1, 0.3)
            elif array.ndim > 1 and "embedding." not in name and "probe" not in name:
                array.normal_(0, array[0].numel() ** -0.5)
            else:
                array.normal_(0, 0.3)
    net.save_pretrained(folder)


def open_clip_embed(
    folder: str, inputs: str, out: str, gelus: list[str], timm_model: dict | None
) -> int:
    """What a folder, loaded strictly as open_clip's documents say, makes of inputs.

    Args:
      out: .npz to write: '<gelu> <image_embeds | text_embeds | logits_per_image>'.
      gelus: 'as configured' first, and 'tanh' or 'none' (exact, with erf), which all are set to.
      timm_model: registers an image tower of such sizes under the name that the folder has.

    Returns:
      How many GELUs are of another form than tanh, as configured.
    """
    import_torchvision()
    import open_clip
    import torch

    if timm_model is not None:
        file = pathlib.Path(folder) / "open_clip_config.json"
        name = json.loads(file.read_text())["model_cfg"]["vision_cfg"]["timm_model_name"]
        _register(name, timm_model)
    net = open_clip.create_model(f"local-dir:{folder}", output_dict=True)
    modules = [module for module in net.modules() if isinstance(module, torch.nn.GELU)]
    not_tanh = sum(module.approximate != "tanh" for module in modules)
    found = {}
    for gelu in gelus:
        if gelu != "as configured":
            for module in modules:
                module.approximate = gelu
        output = _call(net, inputs)
        image, text = output["image_features"], output["text_features"]
        logits = output["logit_scale"] * image @ text.T + output["logit_bias"].detach()
        made = {"image_embeds": image, "text_embeds": text, "logits_per_image": logits}
        found |= {f"{gelu} {name}": x.numpy() for name, x in made.items()}
    np.savez(out, **found)
    return not_tanh


def _register(name: str, sizes: dict) -> None:
    """Gives timm an image tower of other sizes than its vit_*_siglip_*, of the same code."""
    import timm

    def entry(num_classes: int, global_pool: str, **configs):
        del configs  # of pretrained weights
        return timm.models.VisionTransformer(
            num_classes=num_classes, global_pool=global_pool, class_token=False, **sizes
        )

    entry.__name__ = name
    timm.models.register_model(entry)


def _call(net, inputs: str):
    import torch

    with np.load(inputs) as given, torch.inference_mode():
        return net.eval()(**{name: torch.from_numpy(given[name]) for name in given.files})


ACTIONS = {
    action.__name__: action
    for action in (versions, sigmoid_loss, transformers_embed, transformers_random, open_clip_embed)
}


def serve() -> None:
    # Libraries print to stdout: what they print joins stderr, and only answers go where it led.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = ACTIONS[request.pop("action")](**request)
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    serve()
