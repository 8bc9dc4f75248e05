"""From text to tokens: sources, text columns, tokenization, held-out documents and the sample order."""
