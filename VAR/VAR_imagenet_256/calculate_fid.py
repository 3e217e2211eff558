"""FID and IS of VAR-d16 at 256×256. Guidance and batch size are those of the preset var_d16."""

from VAR.fid import run

if __name__ == "__main__":
    run("var_d16")
