"""Two processes with two devices each get the numbers of one process with four."""

import contextlib
import json
import os
import pathlib
import socket
import sys

import processes

N, BATCH = 21, 8  # the last batch has 5 real rows: 4 of process 0, 1 of process 1


def evaluate(mesh, fakes) -> dict:
    from evaluators import EVALUATORS
    from siglip.losses import definitions
    from siglip.losses.definitions import Loss
    from siglip.losses.pairs import Pairs

    source, params = fakes.random_source(N), fakes.params(t=1.5)
    decoded = []

    class Preprocess(fakes.Preprocess):
        def image(self, image, rng=None):
            decoded.append(image.tobytes())
            return super().image(image, rng)

    loss = Loss(definitions.sigmoid_loss, chance=Pairs().prior_loss)
    results = {}
    for name, evaluator in EVALUATORS.items():
        args = (fakes.Model(), mesh, Preprocess(), source, loss)
        options = {"templates": ("{}", "q {}")} if name == "zeroshot" else {}
        for metric, value, chance in evaluator(*args, batch_size=BATCH, **options).run(params):
            results[f"{name} {metric}"] = [value, chance]
    return {"results": results, "decoded": len(decoded)}


def worker(process: int, port: int) -> None:
    import conftest  # of this folder
    import jax

    address = f"localhost:{port}"
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert jax.device_count() == 4 and jax.local_device_count() == 2
    print(json.dumps(evaluate(conftest.make_mesh(4), conftest.fakes_namespace())))


def test_two_processes_equal_one_and_each_image_is_decoded_once(fakes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *sys.path]),
    }
    command = [sys.executable, __file__]
    with contextlib.ExitStack() as running:
        workers = [
            running.enter_context(processes.started([*command, str(i), str(port)], env=env))
            for i in range(2)
        ]
        outputs = [worker.stdout for worker in processes.end_all(workers)]
    first, second = (json.loads(out.splitlines()[-1]) for out in outputs)
    one = evaluate(fakes.mesh(4), fakes)
    assert first["results"] == second["results"]
    assert set(first["results"]) == set(one["results"]) and len(one["results"]) == 9
    for name, (value, chance) in one["results"].items():
        # A metric is a count over N; the loss is a sum in another order.
        assert abs(first["results"][name][0] - value) < 1e-6, name
        assert first["results"][name][1] == chance, name
    # 21 images in each of three evaluators: (4 + 4 + 4, 4 + 4 + 1).
    assert (first["decoded"], second["decoded"], one["decoded"]) == (36, 27, 63)


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]))
