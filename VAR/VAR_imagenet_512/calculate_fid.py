"""FID and IS of VAR-d36 at 512×512. The guidance is the one behind the paper's number."""

from VAR.fid import run

if __name__ == "__main__":
    run("d36_512", cfg=3.2)
