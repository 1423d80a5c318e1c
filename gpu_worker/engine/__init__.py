"""The engine: one thread owns the GPU, and the rows of many jobs share each UNet call.

engine    the thread as the event loop sees it; core is what it does
batch     who takes the next tick; bounds says how large a call may be, run where a request is: all without torch
loading   who waits for which models; resident knows which are in memory, placed is one of them
denoise   a tick; graphs and fast are other forms of its UNet, for speed
"""
