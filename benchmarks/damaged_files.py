"""What do readers, saved files and checkpoints make of damaged and of hostile files?
Right is an error that names the file, or a result.

    python benchmarks/damaged_files.py           # 800 files of each kind and the hostile ones: about half an hour
    python benchmarks/damaged_files.py --quick   # 200 files

Sound files (`sound_files`) are damaged at random: bits, bytes, numbers, cuts, blocks; half of them below the checksum
or the compression. Files made to do harm are in `hostile_files`. All are read in another process, with limits of time
and of address space. The error must be a ValueError (FileNotFoundError, ImportError); counted are others, those without
the name, more than 5 s of processor time, more than 1 GB, a process that died or had to be killed, and what was done
besides reading (processes, sockets, pickles, writing elsewhere).
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common, hostile_files, sound_files

NAME, PAGE = Path(__file__).stem, "reliability"  # whose file of rows all benchmarks of what goes wrong share
SLOW, LARGE = 5.0, 1 << 30  # seconds of processor time, bytes
KILL = 60.0  # seconds by the clock, on a machine that others use too
ROOM = 4 << 30  # address space beyond what the process begins with
PACKAGES = ("pillow", "pydicom", "pylibjpeg-openjpeg", "nibabel", "h5py", "safetensors")  # that read as well
TYPED = (ValueError, FileNotFoundError, ImportError)
WRONG = ("file not named", "other error", "slow", "over 1 GB", "died", "killed", "did more than read")
NUMBERS = (0, 1, -1, 2**7, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 10**9)


# -------------------------------------------------------------------------------------------------------------- damage


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three damages at random places, more of them near the beginning, where sizes stand."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if not content:
            break
        size = len(content)
        place = int(rng.integers(size) if rng.random() < 0.5 else size ** rng.random())
        place = min(place, size - 1)
        length = int(min(size - place, 4 ** (6 * rng.random())))
        match rng.integers(9):
            case 0 | 1:
                content[place] ^= 1 << rng.integers(8)
            case 2:
                content[place : place + length] = rng.bytes(length)
            case 3 | 4:
                number = int(rng.choice(NUMBERS)) % 2**64
                word = struct.pack("<Q" if rng.random() < 0.7 else ">Q", number)
                width = int(rng.choice([1, 2, 4, 8]))
                word = word[:width] if rng.random() < 0.7 else word[-width:]
                content[place : place + width] = word
            case 5:
                del content[place:]
            case 6:
                del content[place : place + length]
            case 7:
                content[place:place] = content[place : place + length]
            case 8:
                content[place : place + length] = bytes(length)
    return bytes(content)


def variant(target: sound_files.Target, sound: bytes, rng: np.random.Generator) -> bytes:
    if target.opened is None or rng.random() < 0.5:
        return damaged(sound, rng)
    parts = target.opened(sound)
    chosen = rng.choice([k for k, part in enumerate(parts) if part])
    return target.sealed(sound, [damaged(p, rng) if k == chosen else p for k, p in enumerate(parts)])


# ------------------------------------------------------------------------------------------------------------- reading


def serve(connection, folder: Path) -> None:
    """Read what is asked for, in a process with limits, and tell what came of it."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others complain there
    targets = {target.name: target for target in sound_files.TARGETS}
    hostile = {(h.label, h.target): h for h in hostile_files.HOSTILE}
    sound: dict[str, tuple[Path, Path]] = {}  # the folder of each kind, and in it the file that is damaged
    place, events = None, []

    def watch(event, arguments):
        if place is None:
            return
        if event.startswith(("subprocess", "os.system", "os.exec", "os.posix_spawn", "socket", "pickle", "shutil")):
            events.append(event)
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            if not Path(os.fsdecode(arguments[0])).resolve().is_relative_to(place):
                events.append(f"write {arguments[0]}")

    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ROOM, resource.RLIM_INFINITY))
    while (job := connection.recv()) is not None:
        name, seed, label = job
        target, here = targets[name], folder / "tree"
        try:
            if name not in sound:
                whole = folder / f"sound {os.getpid()} {len(sound)}"
                whole.mkdir()
                sound[name] = whole, target.make(whole).relative_to(whole)
                target.read(whole)  # compiles what there is to compile, and checks the sound file
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(sound[name][0], here)
            path = here / sound[name][1]
            if label is None:
                path.write_bytes(variant(target, path.read_bytes(), np.random.default_rng(seed)))
            else:
                hostile[label, name].write(path)
        except Exception as error:
            connection.send(f"{name}, {label or seed} was not made: {error!r}")
            return
        connection.send("begin")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, events[:], place = memory("VmRSS"), [], here.resolve()
        start = time.process_time()
        kind, told = "read", ""
        try:
            target.read(here)
        except Exception as error:
            kind = "refused" if isinstance(error, TYPED) else "other error"
            told = f"{type(error).__name__}: {error}"
            where = str(here) if isinstance(error, FileNotFoundError) else path.name  # one folder may be empty now
            if kind == "refused" and where not in told:
                kind = "file not named"
            told = told.replace(str(here), "")
            if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
                kind = "over 1 GB"
        seconds, place = time.process_time() - start, None
        grown = memory("VmHWM") - before
        connection.send((kind, told[:300], seconds, grown, sorted(set(events))))


def memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class Reader:
    """A process that reads files, started again when one of them ended it."""

    def __init__(self, folder: Path):
        self.folder, self.process = folder, None

    def ask(self, name, seed, label):
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other, self.folder), daemon=True)
            self.process.start()
            other.close()
        try:
            self.connection.send((name, seed, label))
            if (begun := self.connection.recv()) != "begin":
                raise RuntimeError(begun)
            if self.connection.poll(KILL):
                return self.connection.recv()
            kind = "killed"
        except EOFError:
            kind = "died"
        self.close(kill=True)
        return kind, f"exit code {self.process_code}", KILL, 0, []

    def close(self, kill=False):
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.connection.send(None)
        self.process.join()
        self.process_code, self.process = self.process.exitcode, None


def count(answers) -> dict:
    """Figures of a row: how many files ended how, and the first of each wrong kind in words."""
    kinds, first, slowest, largest = Counter(), {}, 0.0, 0
    for job, (kind, told, seconds, grown, events) in answers:
        found = {kind} | ({"slow"} if seconds > SLOW else set()) | ({"over 1 GB"} if grown > LARGE else set())
        found |= {"did more than read"} if events else set()
        for one in found:
            kinds[one] += 1
            first.setdefault(one, f"{job}: {told or events}")
        slowest, largest = max(slowest, seconds), max(largest, grown)
    return {
        "files": len(answers), "read": kinds["read"], "refused": kinds["refused"], **{k: kinds[k] for k in WRONG},
        "slowest": slowest, "largest": largest / 1e9, "first": {k: first[k] for k in WRONG if k in first},
    }  # fmt: skip


def measure(args, recorder) -> None:
    settings = {"packages": {name: importlib.metadata.version(name) for name in PACKAGES}}

    def report(row, answers):
        figures = count(answers)
        recorder.add({"row": row}, figures, settings)
        recorder.write()
        print(f"{row}: {figures}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder))
        chosen = [t for t in sound_files.TARGETS if args.targets is None or t.name in args.targets]
        for number, target in enumerate(chosen if args.files else ()):
            seeds = [(args.seed, number, k) for k in range(args.files)]
            report(target.name, [(seed, reader.ask(target.name, seed, None)) for seed in seeds])
        if args.hostile:
            names = {target.name for target in chosen}
            files = [h for h in hostile_files.HOSTILE if h.target in names][:: args.hostile]
            report("hostile", [(f"{h.label}, {h.target}", reader.ask(h.target, None, h.label)) for h in files])
        reader.close()


def render(rows) -> str:
    kinds = [kind for kind in WRONG if any(row["figures"][kind] for row in rows)]
    body = [
        [row["case"]["row"], *(row["figures"][k] for k in ("files", "read", "refused", *kinds)),
         common.rounded(row["figures"]["slowest"], 2), common.whole(1000 * row["figures"]["largest"])]
        for row in rows
    ]  # fmt: skip
    total = ["all", *(sum(line[k] for line in body) for k in range(1, 4 + len(kinds))), "", ""]
    absent = [kind for kind in WRONG if kind not in kinds]
    words = f"Not seen once: {', '.join(absent)}.\n" if absent else ""
    words += f"With {', '.join(' '.join(item) for item in rows[0]['settings']['packages'].items())}.\n\n"
    return words + common.table(
        ["", "files", "read", "refused by name", *kinds, "slowest, s", "largest, MB"], [*body, total]
    )


def main(argv=None) -> None:
    options = common.parser(
        __doc__, defaults={"files": 800, "hostile": 1, "targets": None}, quick={"files": 4, "hostile": 3}
    )
    options.add_argument("--files", type=int, help="damaged files of each kind")
    options.add_argument("--hostile", type=int, help="every how manieth hostile file; 0: none")
    options.add_argument("--targets", nargs="+", help="kinds of files (default: all)")
    args = common.parse(options, argv)
    recorder = common.recorder_of(PAGE, NAME, args)
    measure(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
