"""The device agent: what runs on a device, as one file (`edgekd-agent.pyz`, made by `edgekd.targets.devices.payload`).

Python 3.9 or newer with numpy, Pillow and the artifact's runtime; no torch, no pydantic, no installed edgekd. Beside
this folder the file carries the package's own modules for pixels, clock, environment and runtime, byte for byte.
"""
