"""The only floor that touches diffusers: finds attention modules, reads the grid, swaps processors."""
