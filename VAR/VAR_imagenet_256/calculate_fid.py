"""FID and IS of VAR-d16 at 256×256. The guidance is the one behind the paper's number."""

from VAR.fid import run

if __name__ == "__main__":
    run("d16_256", cfg=2.9)
