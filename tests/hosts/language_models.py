"""Which of the models in the table of hosts read text, and how that may be padded."""

import torch

TEXT = ["BERT", "RoBERTa", "DistilBERT", "GPT-2", "Llama", "Qwen3", "T5", "BART"]
DECODERS = ["GPT-2", "Llama", "Qwen3", "T5", "BART"]
FIRST, SECOND = r"^\D*0", r"^\D*1"  # layers, by the first number in a module's name
PADDED = {
    "none": torch.ones(2, 7, dtype=torch.long),
    "right": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    "left": torch.tensor([[1] * 7, [0] * 3 + [1] * 4]),
}
