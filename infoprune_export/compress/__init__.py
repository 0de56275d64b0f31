"""The InfoPrune method on PyTorch models: statistics, scores, allocation, surgery."""
