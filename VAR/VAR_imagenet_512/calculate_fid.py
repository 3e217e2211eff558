"""FID and IS of VAR-d36 at 512×512. Guidance and batch size are those of the preset var_d36."""

from VAR.fid import run

if __name__ == "__main__":
    run("var_d36")
