"""The short ``saetrain --help``: the commands, and the flags that most runs need.

The text is written by hand, so that it fits on one screen. A test compares its flags and defaults with the settings.
"""

from __future__ import annotations

SHORT_HELP = """\
usage: saetrain MODEL DATASET [DATASET ...] [--flag value ...]
       saetrain COMMAND ...

Train sparse autoencoders (SAEs) on the activations of a transformer.

  saetrain bert-base-uncased wikitext --layers 6 --k 192 --lr auto

commands (saetrain COMMAND --help shows their flags):
  tokenize MODEL DATASET OUT  tokenize a large data set once, into folder OUT
  evaluate PATH               score SAEs on held-out text, with a verdict
  features PATH               collect what each latent fires on
  compare RUN [RUN ...]       show the evaluations of several runs in one table
  cache ACTION                list, verify or prune the cache of activations
  push RUN USER/REPO          upload the SAEs of a run to the Hugging Face hub
  report RUN                  write a page with all results and latents
  explore RUN                 serve that page with a prompt box on this machine
  demo                        train a small SAE, and show what its latents find

arguments:
  MODEL                   hub id or local folder of a transformer
  DATASET                 hub id, folder or file (parquet, jsonl, csv, txt)

main flags (saetrain --help all shows every flag):
  --layers N [N ...]      layers from 0, ranges as 0-5, or all (default: 0)
  --hookpoints PATTERN [PATTERN ...]
                          modules to train on instead, such as 'h.*.mlp'
  --max_tokens N          tokens to train on (default: 1000000)
  --k N [N ...]           active latents per token, one SAE each (default: 192)
  --architecture NAME     topk, batchtopk, jumprelu or others (default: topk)
  --expansion_factor N    latents per activation dimension (default: 32)
  --num_latents N         number of latents, instead of --expansion_factor
  --lr RATE               peak learning rate; use 'auto' (default: 0.001)
  --batch_size N          sequences per micro-batch (default: 4)
  --ctx_len N             tokens per sequence (default: 512)
  --save_dir DIR          parent folder of the run folder (default: output)
  --run_name NAME         name of the run folder (default: from the settings)
  --resume                continue the run from its last checkpoint
  --overwrite             delete an existing run of that name first
  --config FILE.yaml      read settings from a file; flags override the file
  --dry_run               show memory, disk space and time without training
  --version               show the version

To train on several GPUs, start the same command with torchrun.
"""
DESCRIPTION = """Train sparse autoencoders (SAEs) on the activations of a transformer.

Example: saetrain bert-base-uncased wikitext --layers 6 --k 192 --lr auto

Other commands: saetrain tokenize, evaluate, features, compare, report, explore, cache, push and demo (each has --help).

--config FILE.yaml reads settings from a file, such as a run's config.yaml. Flags override the file.

Several values of --k, --num_latents, --expansion_factor, --architecture, --lr and --init_seeds train several SAEs in
one run, one per combination. --grid FILE.yaml lists the combinations instead (docs/sweeps.md)."""
"""Header of ``saetrain --help all``."""
