"""The only floor that touches diffusers: finds attention modules, reads the grid, swaps processors.

Nothing is imported here, so that `import fastdiff` stays light; take what you need from the modules.
"""
