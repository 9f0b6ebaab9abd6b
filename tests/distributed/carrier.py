"""A cable between two network namespaces that is slow and loses packets: `tc netem`, or packets carried by hand.

Linux without netem (small kernels of clouds) has TUN devices: what one host sends comes out of a file, and is written
into the file of the other one, later or never.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001


def netem(namespace: str, device: str, delay: float, loss: float) -> str:
    """Slow down what a device sends; what tc says if it refuses."""
    rule = ["netem", "delay", f"{1e3 * delay:g}ms", "loss", f"{100 * loss:g}%"]
    words = ["ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, "root", *rule]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


@contextmanager
def carried(names: Sequence[str], delay: float, loss: float) -> Iterator[list[int]]:
    """Two TUN devices of these names, and a thread that carries packets between them; yields [carried, lost]."""
    files = [os.open("/dev/net/tun", os.O_RDWR) for _ in names]
    counts, over = [0, 0], threading.Event()
    for file, name in zip(files, names):
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    thread = threading.Thread(target=_carry, args=(files, delay, loss, counts, over), daemon=True)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()
        for file in files:
            os.close(file)


def _carry(files: Sequence[int], delay: float, loss: float, counts: list[int], over: threading.Event) -> None:
    chance, way = random.Random(1), list[tuple[float, int, int, bytes]]()
    while not over.is_set():
        wait = max(0.0, way[0][0] - time.monotonic()) if way else 0.1
        for file in select.select(files, [], [], min(wait, 0.1))[0]:
            packet, lost = os.read(file, 65536), chance.random() < loss
            counts[lost] += 1
            if not lost:
                other = files[1 - files.index(file)]
                heapq.heappush(way, (time.monotonic() + delay, sum(counts), other, packet))
        while way and way[0][0] <= time.monotonic():
            _, _, file, packet = heapq.heappop(way)
            try:
                os.write(file, packet)
            except OSError:
                counts[1] += 1  # the host has taken its device down
