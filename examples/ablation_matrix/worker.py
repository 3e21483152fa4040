"""One process of the matrix.

    python -m examples.ablation_matrix.worker train FLAGS         # dmdr-train
    python -m examples.ablation_matrix.worker build MODEL PART    # build what a named model needs before a run

It ends, as by SIGTERM, when the process that holds the other end of its standard input ends.
"""

import os
import signal
import sys
import threading


def end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock the end of the process would wait for
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def build(name: str, part: str, reward: str = "") -> None:
    from dmdr.settings import registry

    model = registry.load("models", name)()
    if part == "pipeline":
        model.folder()
        model.judge()
    else:
        model.reward_checkpoint(reward, held_out=part == "eval_rewards")


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.argv[1] == "build":
        build(*sys.argv[2:])
    else:
        from dmdr.cli.train import main

        sys.argv = ["dmdr-train", *sys.argv[2:]]
        main()
