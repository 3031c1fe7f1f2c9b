"""A TCP link with a delay: a proxy that hands on what it reads, half a round trip later, in order and without loss.

As a program: `delay.py LISTEN_PORT TARGET_PORT ROUND_TRIP_MS`. The kernel of a machine without sch_netem can do no better;
what it cannot imitate is loss (the VM can: tests/vm).
"""

import collections
import select
import socket
import sys
import threading
import time

HOST = "127.0.0.1"
CHUNK = 1 << 18
# More than a fast link carries in the longest delay: the proxy must not be what limits.
MOST_BYTES = 1 << 28


class Pipe:
    """One direction of one connection."""

    def __init__(self, source, sink, delay_s):
        self.source, self.sink, self.delay_s = source, sink, delay_s
        self.queue = collections.deque()
        self.held = 0
        self.change = threading.Condition()
        for work in (self.read, self.write):
            threading.Thread(target=work, daemon=True).start()

    def read(self):
        """Takes what comes and notes when it may go on. An empty piece is the end."""
        data = b"."
        while data:
            try:
                data = self.source.recv(CHUNK)
            except OSError:
                data = b""
            with self.change:
                self.change.wait_for(lambda: self.held < MOST_BYTES)
                self.queue.append((time.monotonic() + self.delay_s, data))
                self.held += len(data)
                self.change.notify_all()

    def write(self):
        """Sends everything that is due in one piece."""
        while True:
            with self.change:
                self.change.wait_for(lambda: self.queue)
                due = self.queue[0][0]
            wait = due - time.monotonic()
            if wait > 0:
                # Finer than time.sleep, which rounds up to the timer slack of the thread.
                select.select([], [], [], wait)
            now, pieces, ended = time.monotonic(), [], False
            with self.change:
                while self.queue and self.queue[0][0] <= now:
                    piece = self.queue.popleft()[1]
                    ended = ended or not piece
                    pieces.append(piece)
                    self.held -= len(piece)
                self.change.notify_all()
            try:
                self.sink.sendall(b"".join(pieces))
                if ended:
                    self.sink.shutdown(socket.SHUT_WR)
            except OSError:
                ended = True
            if ended:
                return


def serve(listen_port, target_port, round_trip_ms):
    """Takes connections until it is killed."""
    delay_s = round_trip_ms / 2000
    with socket.create_server((HOST, listen_port)) as server:
        while True:
            client = server.accept()[0]
            try:
                target = socket.create_connection((HOST, target_port))
            except OSError:
                client.close()
                continue
            for end in (client, target):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Pipe(client, target, delay_s)
            Pipe(target, client, delay_s)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
