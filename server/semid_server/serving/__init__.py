"""Serving: batches across callers, one thread that owns the model, gRPC around it.

From the outside in: `server` (lifecycle) builds everything; `calls` count calls and turn
errors into statuses; `servicer` speaks the contract; `batcher` admits requests and forms batches;
`backend` runs them on the device. The batcher knows neither gRPC nor torch, the servicer no torch.
"""
