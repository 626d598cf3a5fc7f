"""How good a frozen depth encoder is, on your data or on rendered parts, beside encoders that need no training."""
