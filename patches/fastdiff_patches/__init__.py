"""The only floor that imports diffusers when it is imported: finds attention modules, reads the grid, swaps processors.

Nothing is imported here, so that `import fastdiff` stays light; take what you need from the modules.
"""
