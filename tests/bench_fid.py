"""How much faster than pytorch-fid 0.3.0, and how near, in one process, with random weights and
pictures.

    pip install --no-deps pytorch-fid==0.3.0 && python tests/bench_fid.py
"""
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pytorch_fid.fid_score as peer
import pytorch_fid.inception

import fid


def timed(function, *args, repeat=3, **kwargs):
    """-> the shortest of some times in seconds, and the result."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        times.append(time.perf_counter() - start)
    return min(times), result


def main(n=150):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    ours = fid.InceptionV3()
    for value in ours.state_dict().values():              # so that features neither die nor explode
        if value.ndim > 1:
            value.normal_(std=(2 / value[0].numel()) ** 0.5)
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: ours.state_dict()
    theirs = peer.InceptionV3([3]).to(device).eval()
    ours.fold().to(device, memory_format=torch.channels_last)

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(n):
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            coarse.resize((256, 256), Image.Resampling.BICUBIC).save(f"{folder}/{i:04d}.jpg")
        files = sorted(Path(folder).iterdir())
        peer.tqdm = lambda batches: batches
        t1, features1 = timed(peer.get_activations, files, theirs, 50, 2048, device,
                              len(os.sched_getaffinity(0)))
        t2, found = timed(fid.measure, fid.open_folder(folder), [ours], ["pool"], ["pool"], 50,
                          device=device)
    features2 = found[1]["pool"].cpu().double().numpy()
    print(f"files to features, {n} JPEGs of 256 x 256, images/s: pytorch-fid {n / t1:.1f}, fid.py {n / t2:.1f}, "
          f"{t1 / t2:.2f} times; relative difference "
          f"{np.linalg.norm(features1 - features2) / np.linalg.norm(features1):.1e}")

    statistics = []
    for seed in (0, 1):                                   # 5,000 features each, as ReLU leaves them
        rng = np.random.default_rng(seed)
        x = np.maximum(rng.standard_normal((5000, 2048)) @ rng.standard_normal((2048, 2048)) / 45,
                       0)
        statistics += [x.mean(0), np.cov(x, rowvar=False)]
    t2, found = timed(fid.frechet_distance, *statistics)
    t1, expected = timed(peer.calculate_frechet_distance, *statistics, repeat=1)
    print(f"Frechet distance, d = 2048, s: pytorch-fid {t1:.2f}, fid.py {t2:.2f}, {t1 / t2:.1f} times; "
          f"{expected:.8f} and {found:.8f}")


if __name__ == "__main__":
    main()
