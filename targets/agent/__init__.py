"""The device agent, which runs on a device as one file (`edgekd-agent.pyz`, made by `edgekd.targets.devices.payload`).

It needs Python 3.9 or newer with numpy, Pillow and the artifact's runtime, but not torch, pydantic or edgekd. The file
also contains unchanged modules of the package for pixels, clock, environment and runtime.
"""
