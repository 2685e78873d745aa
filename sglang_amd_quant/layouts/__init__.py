"""How bytes lie in memory: one value class per layout, each with pack and unpack."""
