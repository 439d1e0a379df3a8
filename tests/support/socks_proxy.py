"""A SOCKS5 proxy on 127.0.0.1, as the programs that people use to reach other networks open one.

Not named socks.py: in a script that launch.py runs, it would take the place of PySocks.
"""

import socket
import socketserver
import threading

PASSWORD_METHOD = 2


class Proxy:
    """The proxy, a context manager. `targets` lists the (host, port) it was asked to connect to."""

    def __init__(self):
        self.targets: list[tuple[str, int]] = []

    def __enter__(self) -> "Proxy":
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.proxy = self
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request, client_address) -> None:
        """A target that doesn't answer: the client sees its connection end."""


class Handler(socketserver.StreamRequestHandler):
    """One connection: the greeting, a target, then bytes in both directions (RFC 1928, 1929)."""

    def handle(self) -> None:
        methods = self.rfile.read(self.rfile.read(2)[1])
        if PASSWORD_METHOD in methods:
            self.connection.sendall(bytes([5, PASSWORD_METHOD]))
            self.rfile.read(self.rfile.read(2)[1])  # user
            self.rfile.read(self.rfile.read(1)[0])  # password
            self.connection.sendall(b"\x01\x00")
        else:
            self.connection.sendall(b"\x05\x00")
        kind = self.rfile.read(4)[3]
        if kind == 3:
            host = self.rfile.read(self.rfile.read(1)[0]).decode()
        else:
            host = socket.inet_ntoa(self.rfile.read(4))
        port = int.from_bytes(self.rfile.read(2))
        self.server.proxy.targets.append((host, port))
        with socket.create_connection((host, port)) as target:
            self.connection.sendall(b"\x05\x00\x00\x01" + bytes(6))
            answers = threading.Thread(target=pump, args=(target, self.connection), daemon=True)
            answers.start()
            pump(self.connection, target)
            answers.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Hand on what arrives, until one side hangs up."""
    try:
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass
