"""What vLLM itself says of adapters' configs, as JSON. Run by the interpreter of vLLM's environment, not by ours.

python vllm_reads.py MAX_LORA_RANK FOLDER...
"""

from __future__ import annotations

import json
import sys
from typing import get_args

if __name__ == "__main__":
    from vllm.config.lora import LoRAConfig, MaxLoRARanks  # type: ignore[import-not-found]
    from vllm.lora.peft_helper import PEFTHelper  # type: ignore[import-not-found]

    limits = LoRAConfig(max_lora_rank=int(sys.argv[1]))
    found: dict[str, object] = {"ranks": list(get_args(MaxLoRARanks))}
    for folder in sys.argv[2:]:
        try:
            PEFTHelper.from_local_dir(folder, None).validate_legal(limits)
            found[folder] = ""
        except ValueError as error:
            found[folder] = str(error)
    sys.stdout.write(f"\n{json.dumps(found)}\n")
