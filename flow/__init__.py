"""Flow matching (Lipman et al. 2023, arXiv 2210.02747; Tong et al. 2024, arXiv 2302.00482) on CIFAR-10 and digits."""
