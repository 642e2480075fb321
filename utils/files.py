"""Files that are whole or absent: writing, locking, checksums, downloads, archives.

Look here to see why nothing on the disk is ever half there.
"""
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from utils.cli import UserError, one_line, size_text
from utils.processes import DISK_REFUSES, note

# ---- Writing -------------------------------------------------------------------------------------

def part_of(path):
    """A temporary path beside `path`, whose name says which process writes it."""
    path = Path(path)
    return path.with_name(f".part-{os.getpid()}-{socket.gethostname()}-{path.name[-40:]}")


@contextlib.contextmanager
def write_whole(path, part=None):
    """Yields a temporary path beside `path`, renamed at the end: nobody meets half a file."""
    path = Path(path)
    part = part or part_of(path)
    make_folder(path.parent)
    try:
        yield part
        part.replace(path)
    except Exception as error:                                # a full disk, no permission, ...
        cause = error
        while cause is not None and not isinstance(cause, OSError):   # torch.save wraps it
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}; "
                        "what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def make_folder(path):
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        dead = [p for p in (path, *path.parents) if p.is_symlink() and not p.exists()]
        why = f"{dead[0]} is a link that leads nowhere" if dead else error.strerror
        raise UserError(f"the folder {path} cannot be made: {why}") from error


def write_json(path, value):
    with write_whole(path) as part:
        part.write_text(json.dumps(value, indent=1))


def cut_log(path, step):
    """Leaves the lines up to the checkpoint's step: what came after it is done again."""
    lines, kept, broken = [], [], False
    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    for line in lines:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            broken = True
    if broken:
        aside = path.with_name(f"log-with-broken-lines-{time.time_ns()}.jsonl")
        note(f"{path} had lines that are not of the log; as it was it is now {aside}")
        path.replace(aside)
    with write_whole(path) as part:
        part.write_text("".join(kept))


def append_line(path, step, line):
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:                                  # a full disk names no file
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder, wait=False):
    """Keeps other runs out of a folder, as long as this process lives; or waits until they are.

    Temporary files to which nobody wrote for an hour are removed: their writers were killed.
    """
    folder = Path(folder)
    make_folder(folder)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl                                      # not on Windows
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise UserError(f"{folder}: another run is writing there: wait for its end, or "
                                    "name another folder") from None
                note(f"{folder}: another run is writing there: waiting for its end")
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            note(f"{folder} cannot be locked ({error}): start no second run there")
        for part in folder.glob(".part-*"):
            if time.time() - part.stat().st_mtime > 3600:
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        yield


def folder_by_hash(root, name, manifest):
    """root/NAME-HASH of what a manifest says; if there is one of another name, that."""
    digest = hash_of(manifest)[:12]
    return next(Path(root).glob(f"[!.]*-{digest}"), Path(root) / f"{name[-80:]}-{digest}")


def free_bytes(folder):
    """On the disk of a folder that need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- Checksums -----------------------------------------------------------------------------------

def verify(path, what_to_do, size=None, sha256=None, md5=None):
    """Returns path, if the file has this size in bytes and these sums, or UserError: what_to_do."""
    found = Path(path).stat().st_size
    if size is not None and found != size:
        raise UserError(f"{path} has {found:,} bytes, expected were {size:,}: {what_to_do}")
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected and (found := file_hash(path, kind)) != expected:
            raise UserError(f"{path} has the {kind} {found}, expected was {expected}: {what_to_do}")
    return path


def file_hash(path, kind="sha256"):
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(value):
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- Downloads -----------------------------------------------------------------------------------

def from_hub(repo, file, revision=None, fetch=True):
    """Returns path, None or None, why not: a file of the Hub, from its cache or fetched."""
    from huggingface_hub import (get_hf_file_metadata, hf_hub_download, hf_hub_url,
                                 try_to_load_from_cache)
    path, reason = try_to_load_from_cache(repo, file, revision=revision), "no network"
    if isinstance(path, str):
        return path, None
    if fetch:
        try:                                                  # a probe first, without long retries
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=10)
            return hf_hub_download(repo, file, revision=revision), None
        except Exception as error:                            # the Hub's client has many kinds
            if isinstance(error, OSError) and error.errno in DISK_REFUSES:
                raise
            reason = one_line(error, 500)
    return None, reason


def download(url, path, size=None, sha256=None, md5=None):
    """Returns path, a whole and verified file: fetched if not there, resumed where it broke off.

    size in bytes; http, https and file URLs. UserError: no network, no room, or not the file that
    was expected.
    """
    path = Path(path)
    if not path.exists():
        with locked(path.parent, wait=True):
            if not path.exists():                             # else another run was faster
                return fetch(url, path, size, sha256, md5)
    return verify(path, f"remove it to fetch it again from {url}", size, sha256, md5)


def fetch(url, path, size, sha256, md5):
    part = Path(f"{path}.part")
    have = part.stat().st_size if part.exists() else 0
    by_hand = f"or put the file at {path} by hand"
    if not have or have != size:                              # else it only lacks its name
        headers = {"User-Agent": "sphere-latent-encoder"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request, timeout=20) as response:
                if response.status != 206:                    # the server sends it from the start
                    have = 0
                total = have + int(response.headers["Content-Length"] or 0)
                free = free_bytes(part.parent)
                if total - have > free:
                    raise UserError(f"{url} has {size_text(total)}, but {part.parent} has "
                                    f"{size_text(free)} free")
                with open(part, "ab" if have else "wb") as file, tqdm(
                        desc=path.name, total=total or None, initial=have, unit="B",
                        unit_scale=True, disable=None) as bar:
                    while block := response.read(1 << 20):
                        have += file.write(block)
                        bar.update(len(block))
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:                    # no more: not a part of this file
                part.unlink()
                return fetch(url, path, size, sha256, md5)
            raise UserError(f"{url} cannot be fetched ({error}): try later, {by_hand}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError,
                ssl.SSLError) as error:
            so_far = f" after {size_text(have)}, which the same command resumes" * bool(have)
            raise UserError(f"{url} cannot be fetched ({getattr(error, 'reason', error)}){so_far}: "
                            f"is there a network? Try again, {by_hand}") from error
        if have < total:
            raise UserError(f"{url} broke off at {size_text(have)} of {size_text(total)}: the same "
                            f"command resumes it, {by_hand}")
    try:
        verify(part, f"it was removed; fetch {url} again, {by_hand}", size, sha256, md5)
    except UserError:
        part.unlink()
        raise
    part.replace(path)
    return path


def unpack(archive, folder, name):
    """The folder `name` of a .zip or .tgz -> folder/name, whole or not at all, without links."""
    def plain(member, path):                                  # names that lead out are refused
        if not (member.isfile() or member.isdir()):
            raise tarfile.FilterError(f"{member.name} is a link or a device")
        return tarfile.data_filter(member, path)

    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot keep an archive inside its folder: take 3.10.12, "
                        "3.11.4 or newer")
    part = folder / f".part-{name}"
    with locked(folder, wait=True):
        if (folder / name).exists():                          # another run was faster
            return
        note(f"unpacking {archive}")
        try:
            shutil.rmtree(part, ignore_errors=True)
            if archive.suffix == ".zip":                      # makes no links, keeps names inside
                with zipfile.ZipFile(archive) as opened:
                    opened.extractall(part)
            else:
                with tarfile.open(archive) as opened:
                    opened.extractall(part, filter=plain)
            if not (part / name).is_dir():
                raise UserError(f"{archive} has no folder {name}: it is another archive than "
                                "expected")
            (part / name).rename(folder / name)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
            raise UserError(f"{archive} cannot be unpacked ({error}): remove it to fetch it "
                            "again") from error
        finally:                                              # still locked: it may be another's
            shutil.rmtree(part, ignore_errors=True)
