//! The Debian packages that the lab needs, installed if they are missing.

use std::{
    fs,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// What the lab needs, and for what.
const PACKAGES: [&str; 16] = [
    // The machine and its kernel.
    "qemu-system-x86",
    "linux-image-amd64",
    // siw.ko: Debian's kernel leaves it out, its source has it.
    "linux-headers-amd64",
    "linux-source-6.1",
    "gcc",
    "make",
    "xz-utils",
    "binutils",
    // What runs in the guest.
    "busybox-static",
    "iproute2",
    "rdma-core",
    "ibverbs-providers",
    "librdmacm1",
    "ibverbs-utils",
    "rdmacm-utils",
    "perftest",
];

/// Installs what is missing; says which. Errors carry the command to run by hand.
pub(crate) fn ensure() -> Result<()> {
    let version = fs::read_to_string("/etc/debian_version").unwrap_or_default();
    if !version.starts_with("12") || !cfg!(target_arch = "x86_64") {
        bail!("the lab needs Debian 12 on x86-64, for its kernel and that kernel's source");
    }
    let missing = missing(&installed()?);
    if missing.is_empty() {
        return Ok(());
    }
    let wanted = missing.join(" ");
    if !is_root()? {
        bail!("packages are missing; run: sudo apt-get install --no-install-recommends {wanted}");
    }
    crate::say(&format!("installing {wanted}"));
    if apt(&missing).is_err() {
        // A fresh image has no package lists, and old ones name files that are gone.
        crate::say("installing failed; refreshing the package lists and trying again");
        run(Command::new("apt-get").args(["--quiet", "update"]))?;
        apt(&missing)
            .with_context(|| format!("apt-get install --no-install-recommends {wanted}"))?;
    }
    Ok(())
}

fn apt(packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(["--quiet", "--yes", "--no-install-recommends", "install"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    run(&mut command)
}

fn run(command: &mut Command) -> Result<()> {
    let ended = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("starting apt-get")?;
    if !ended.success() {
        bail!("apt-get: {ended}");
    }
    Ok(())
}

/// One line a package that dpkg knows: its state, and its name.
fn installed() -> Result<String> {
    let output = Command::new("dpkg-query")
        .args([
            "--show",
            "--showformat",
            "${db:Status-Status} ${Package}\\n",
        ])
        .args(PACKAGES)
        .stderr(Stdio::null())
        .output()
        .context("starting dpkg-query")?;
    // Its exit code says that some package is unknown, which the text says better.
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn missing(listing: &str) -> Vec<&'static str> {
    let is_installed = |package: &str| {
        listing
            .lines()
            .any(|line| line.strip_prefix("installed ") == Some(package))
    };
    PACKAGES
        .into_iter()
        .filter(|package| !is_installed(package))
        .collect()
}

fn is_root() -> Result<bool> {
    let output = Command::new("id")
        .arg("-u")
        .output()
        .context("starting id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_or_unknown_package_is_missing() {
        let all: String = PACKAGES
            .iter()
            .map(|name| format!("installed {name}\n"))
            .collect();
        assert!(missing(&all).is_empty());
        let without_two = all
            .replace("installed perftest\n", "config-files perftest\n")
            .replace("installed rdma-core\n", "");
        assert_eq!(missing(&without_two), ["rdma-core", "perftest"]);
    }
}
