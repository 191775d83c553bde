"""Keep other libraries' progress bars and advice off the terminal for a whole run."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Called once, before the libraries are used: no bars beside ours, no advice the user cannot follow."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # transformers warns about arguments that transformers and peft pass to each other
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
