"""The bare llama.cpp server in a process of its own: what windfarm is compared with. Prints its address, then serves
until its standard input is closed. Everything that is not given here is llama.cpp's default.
"""

import argparse
import os
import sys

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a .gguf file")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parallel", type=int, default=4, help="slots")
    parser.add_argument("--context", type=int, required=True, help="tokens of one slot")
    options = parser.parse_args()
    server = xllamacpp.Server(parameters(options))
    print(server.listening_address, flush=True)
    sys.stdin.read()
    del server


def parameters(options: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = options.parallel
    params.n_ctx = options.context * options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.fit_params = False
    params.verbosity = 1
    return params


if __name__ == "__main__":
    main()
