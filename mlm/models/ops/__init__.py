"""The operations of a layer: attention, dense, dropout, activation, rotary positions, gather, position ids."""
