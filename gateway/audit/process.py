"""The auditor process: one thread, one key, one log. `python -m gateway.audit.process --dir D --key F --socket S`.

It takes what all ready clients have sent, makes it durable as one group, then acknowledges. Only the owner's
processes are heard (SO_PEERCRED). After an OSError of the log it exits: whoever supervises starts a new
one, which verifies from disk first. While nothing happens it sleeps without a timer.
"""

import argparse
import ctypes
import gc
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.audit import protocol
from gateway.audit.checkpoint import PINNED_FILE, log_id
from gateway.audit.errors import AuditDamaged, RecordInvalid
from gateway.audit.record import decode_group
from gateway.audit.writer import CHECKPOINT_RECORDS, Entry, Writer
from gateway.trust.files import write_durably
from gateway.trust.notes import Signer, TrustError, load_or_create_key

CHECKPOINT_S = 1.0
MAX_CLIENTS = 1024
RECEIVE_BYTES = 256 << 10
PR_SET_PDEATHSIG = 1
GC_OBJECTS = 50_000  # records leave no cycles behind
EXIT_DAMAGED, EXIT_FAULT = 4, 3


class Client:
    """One connected gateway process and what of its groups is still incomplete."""

    __slots__ = ("buffer", "connection")

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""

    def receive(self, scratch: memoryview) -> list[bytes | memoryview] | None:
        """The complete groups that have arrived, valid until `scratch` is used again; `None`: drop this client."""
        try:
            received = self.connection.recv_into(scratch)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not received:
            return None
        buffer: bytes | memoryview = scratch[:received]
        if self.buffer:
            buffer = self.buffer + buffer
        groups: list[bytes | memoryview] = []
        position, size, header = 0, len(buffer), protocol.LENGTH.size
        while size - position >= header:
            (length,) = protocol.LENGTH.unpack_from(buffer, position)
            if length > protocol.MAX_GROUP_BYTES:
                return None
            end = position + header + length
            if end > size:
                break
            groups.append(buffer[position + header : end])
            position = end
        self.buffer = bytes(buffer[position:])
        return groups


class Auditor:
    """Serves the clients of one log."""

    def __init__(self, writer: Writer, listener: socket.socket, owner_uid: int) -> None:
        self._writer, self._listener, self._owner = writer, listener, owner_uid
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._wake, notify = socket.socketpair()
        self._wake.setblocking(False)
        notify.setblocking(False)
        self._notify = notify
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._signed_at = time.monotonic()
        self._stopping = False
        self._clients = 0
        self._scratch = memoryview(bytearray(RECEIVE_BYTES))

    def stop(self, *_: object) -> None:
        """Signal handler: finish what has arrived, then end cleanly."""
        self._stopping = True
        self._notify.send(b"x")

    def run(self) -> None:
        """Serve until stopped; raises OSError when the log cannot be trusted to be durable any more."""
        while not self._stopping:
            timeout = None
            if self._writer.size > self._writer.signed:
                timeout = max(0.0, self._signed_at + CHECKPOINT_S - time.monotonic())
            self._turn(timeout)
            unsigned = self._writer.size - self._writer.signed
            if unsigned and (unsigned >= CHECKPOINT_RECORDS * 10 or time.monotonic() >= self._signed_at + CHECKPOINT_S):
                self._writer.checkpoint()
                self._signed_at = time.monotonic()
        self._turn(0.0)
        self._writer.close()

    def _turn(self, timeout: float | None) -> None:
        entries: list[Entry] = []
        owners: list[tuple[Client, int]] = []
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake:
                self._wake.recv(64)
            else:
                self._collect(key.data, entries, owners)
        if not entries:
            return
        results = [protocol.REFUSED if isinstance(r, RecordInvalid) else r for r in self._writer.append(entries)]
        position = 0
        for client, count in owners:
            self._answer(client, protocol.pack_answer(results[position : position + count]))
            position += count

    def _collect(self, client: Client, entries: list[Entry], owners: list[tuple[Client, int]]) -> None:
        groups = client.receive(self._scratch)
        if groups is None:
            self._drop(client)
            return
        for payload in groups:
            try:
                group = decode_group(payload)
            except RecordInvalid as error:
                print(f"a client is dropped: {error}", file=sys.stderr, flush=True)
                self._drop(client)
                return
            entries += group
            owners.append((client, len(group)))

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        uid = struct.unpack("3i", credentials)[1]
        if uid not in (self._owner, os.getuid()) or self._clients >= MAX_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        connection.send(self._writer.log_id.encode().ljust(protocol.HELLO_BYTES, b"\x00"))
        self._selector.register(connection, selectors.EVENT_READ, Client(connection))
        self._clients += 1

    def _answer(self, client: Client, data: bytes) -> None:
        try:
            sent = client.connection.send(data)
        except OSError:
            sent = -1
        if sent != len(data):  # a client that does not read its answers is no use
            self._drop(client)

    def _drop(self, client: Client) -> None:
        try:
            self._selector.unregister(client.connection)
        except (KeyError, ValueError):
            return
        client.connection.close()
        self._clients -= 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Source: prctl(2)."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _pin(path: Path, vkey: str) -> None:
    """Keep the log's key outside the log; a key that is not the pinned one signs nothing here."""
    if not path.exists():
        write_durably(path, f"{vkey}\n".encode(), 0o644)
    elif path.read_text().strip() != vkey:
        raise AuditDamaged(f"the signing key is not the one pinned in {path.name}: was it replaced?")


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old)
    listener.listen(64)
    return listener


def main() -> int:
    """Run the auditor; exit codes: 0 stopped, 3 environment fault, 4 the log is damaged."""
    parser = argparse.ArgumentParser(description="The auditor process of one audit log.")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--durability", choices=("fsync", "os"), default="fsync")
    parser.add_argument("--owner-uid", type=int, default=os.getuid())
    parser.add_argument("--standalone", action="store_true", help="do not end with the parent process")
    arguments = parser.parse_args()
    if not arguments.standalone:
        die_with_parent()
    try:
        arguments.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = load_or_create_key(arguments.key)
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        signer = Signer(log_id(public), key)
        _pin(arguments.key.with_name(PINNED_FILE), signer.verifier.vkey)
        writer = Writer(arguments.dir, signer, durability=arguments.durability, boot=secrets.token_hex(8))
        auditor = Auditor(writer, _listen(arguments.socket), arguments.owner_uid)
        signal.signal(signal.SIGTERM, auditor.stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gc.freeze()
        gc.set_threshold(GC_OBJECTS)
        print("ready", flush=True)
        auditor.run()
        arguments.socket.unlink(missing_ok=True)
    except AuditDamaged as error:
        print(f"the audit log is damaged, nothing is written to it: {error}", file=sys.stderr, flush=True)
        return EXIT_DAMAGED
    except (OSError, TrustError) as error:
        print(f"the audit log cannot be written: {error}", file=sys.stderr, flush=True)
        return EXIT_FAULT
    return 0


if __name__ == "__main__":
    sys.exit(main())
