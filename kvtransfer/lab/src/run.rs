//! One run on the host: packages, driver, programs, image, machine, table.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    Arguments, build,
    clock::Stopwatch,
    guest,
    image::Image,
    kernel::{Kernel, PARAMETERS},
    machine::Machine,
    packages,
    plan::{self, Plan},
    protocol::Report,
    report::Results,
};

/// Programs of the host that the guest's jobs use.
const TOOLS: [&str; 12] = [
    "busybox",
    "ip",
    "ss",
    "rdma",
    "ibv_devices",
    "ibv_devinfo",
    "rping",
    "udaddy",
    "ib_write_bw",
    "ib_write_lat",
    "ib_read_bw",
    "ib_send_lat",
];
/// Names under which the guest finds busybox.
const APPLETS: [&str; 36] = [
    "awk", "cat", "cp", "cut", "date", "dmesg", "echo", "env", "false", "find", "free", "grep",
    "head", "hexdump", "id", "kill", "ls", "mkdir", "mount", "mv", "ping", "printf", "ps", "pwd",
    "rm", "sed", "seq", "sh", "sleep", "sort", "tail", "tee", "timeout", "top", "true", "wc",
];
/// The user-space drivers of siw and rxe; libibverbs would load all others too, for nothing.
const PROVIDERS: [&str; 2] = ["siw", "rxe"];
const PROVIDER_FOLDER: &str = "/usr/lib/x86_64-linux-gnu/libibverbs";

/// A run's own folder is named so, and after its process.
const SCRATCH: &str = "run-";

/// The guest's first process. The shell also waits for orphans, as a first process must.
const INIT: &str = "#!/bin/busybox sh
export PATH=/usr/bin
ulimit -l unlimited
ulimit -n 65536
ulimit -c 0
/usr/bin/rdma-lab guest
/bin/busybox poweroff -f
";

/// Runs what the arguments ask for; whether it passed.
pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    let whole = Stopwatch::start();
    packages::ensure()?;
    let folder = lab_folder()?;
    let kernel = Kernel::newest()?;
    let siw = kernel.siw(&folder)?;
    stage("packages and kernel", whole);

    let watch = Stopwatch::start();
    let plan = plan::make(arguments)?;
    stage("programs", watch);
    if plan.orders.is_empty() {
        let (table, _) = Results::new(plan.outcomes, PathBuf::new()).table(&arguments.only);
        crate::show(&table);
        return Ok(false);
    }

    remove_abandoned(&folder)?;
    let scratch = folder.join(format!("{SCRATCH}{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| format!("making {}", scratch.display()))?;
    let done = in_machine(arguments, &kernel, &siw, &plan, &scratch, whole);
    if arguments.keep {
        let kept = folder.join(format!("kept-{}", std::process::id()));
        fs::rename(&scratch, &kept).with_context(|| format!("making {}", kept.display()))?;
        crate::say(&format!("image and logs: {}", kept.display()));
    } else {
        fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    }
    done
}

fn stage(name: &str, watch: Stopwatch) {
    crate::say(&format!("{:5.1} s  {name}", watch.seconds()));
}

/// Removes the folders of runs that were killed.
fn remove_abandoned(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).context("reading the lab's folder")? {
        let entry = entry.context("reading the lab's folder")?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_alive = |id: &str| Path::new("/proc").join(id).exists();
        if name.strip_prefix(SCRATCH).is_some_and(|id| !is_alive(id)) {
            let path = entry.path();
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// Below cargo's target folder, where this program lies.
fn lab_folder() -> Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program")?;
    let target = program
        .ancestors()
        .nth(2)
        .context("this program is in no target folder")?;
    let folder = target.join("rdma-lab");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder)
}

fn in_machine(
    arguments: &Arguments,
    kernel: &Kernel,
    siw: &Path,
    plan: &Plan,
    scratch: &Path,
    whole: Stopwatch,
) -> Result<bool> {
    let watch = Stopwatch::start();
    let image = make_image(arguments, kernel, siw, plan, scratch)?;
    let path = scratch.join("image.cpio");
    let bytes = image.write(&path)?;
    stage(&format!("image of {} MiB", bytes >> 20), watch);

    let outputs = scratch.with_file_name("out");
    for (name, _) in &plan.outcomes {
        let old = outputs.join(name);
        if old.exists() {
            fs::remove_dir_all(&old).with_context(|| format!("removing {}", old.display()))?;
        }
    }
    let mut results = Results::new(plan.outcomes.clone(), outputs);
    let machine = Machine::boot(kernel, &path, scratch)?;
    let mut is_started = false;
    let watched = machine.watch(Duration::from_secs(arguments.limit), |report| {
        if matches!(report, Report::Started { .. }) && !is_started {
            is_started = true;
            stage("until the first job, from the start", whole);
        }
        if let Some(line) = results.take(report)? {
            crate::show(&line);
        }
        Ok(())
    });
    if let Err(error) = &watched {
        crate::say(&format!("FAILED: {error:#}"));
    }
    stage("in all", whole);
    let (table, is_passed) = results.table(&arguments.only);
    crate::show(&table);
    if let Some(running) = results.cut_short() {
        crate::say(&format!("when the machine ended, {running}"));
    }
    Ok(is_passed && watched.is_ok())
}

fn make_image(
    arguments: &Arguments,
    kernel: &Kernel,
    siw: &Path,
    plan: &Plan,
    scratch: &Path,
) -> Result<Image> {
    let mut image = Image::new();
    image.text("/init", INIT, 0o755);
    image.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644);
    image.text("/etc/group", "root:x:0:\n", 0o644);
    image.text("/etc/hosts", "127.0.0.1 localhost\n", 0o644);
    image.text("/etc/nsswitch.conf", "hosts: files\n", 0o644);
    for tool in TOOLS {
        image.tool(tool)?;
    }
    for applet in APPLETS {
        image.link(&format!("/usr/bin/{applet}"), "busybox");
    }
    let this = std::env::current_exe().context("finding this program")?;
    let programs = plan
        .programs
        .iter()
        .map(|(path, name)| (path.as_path(), name.as_str()));
    for (path, name) in programs.chain([(this.as_path(), "rdma-lab")]) {
        let small = build::stripped(path, scratch)?;
        image.copy(&small, &Path::new("/usr/bin").join(name))?;
    }
    for path in &arguments.with {
        let name = path
            .file_name()
            .with_context(|| format!("{} has no name", path.display()))?;
        image.copy(path, &Path::new("/usr/bin").join(name))?;
    }
    verbs_providers(&mut image)?;
    modules(&mut image, kernel, siw)?;
    let mut orders = String::new();
    for order in &plan.orders {
        orders.push_str(&order.text()?);
    }
    image.text(guest::ORDERS, &orders, 0o644);
    image.libraries()?;
    Ok(image)
}

/// libibverbs opens these at run time, so no program's list of libraries names them.
fn verbs_providers(image: &mut Image) -> Result<()> {
    for provider in PROVIDERS {
        image.text(
            &format!("/etc/libibverbs.d/{provider}.driver"),
            &format!("driver {provider}\n"),
            0o644,
        );
        let prefix = format!("lib{provider}-rdmav");
        let mut is_found = false;
        let entries = fs::read_dir(PROVIDER_FOLDER).context("reading the verbs providers")?;
        for entry in entries {
            let path = entry.context("reading the verbs providers")?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if name.starts_with(&prefix) {
                image.copy(&path, &path)?;
                is_found = true;
            }
        }
        if !is_found {
            bail!("{PROVIDER_FOLDER} has no provider for {provider}");
        }
    }
    Ok(())
}

fn modules(image: &mut Image, kernel: &Kernel, siw: &Path) -> Result<()> {
    let mut list = String::new();
    for path in kernel.modules()?.iter().map(PathBuf::as_path).chain([siw]) {
        let name = path.file_name().context("a module without a name")?;
        let place = Path::new("/lab").join(name);
        // A module is no program: the loader cannot say what it needs.
        image.data(path, &place)?;
        list.push_str(&place.to_string_lossy());
        for (_, parameter) in PARAMETERS.iter().filter(|(module, _)| name == *module) {
            list.push(' ');
            list.push_str(parameter);
        }
        list.push('\n');
    }
    image.text(guest::MODULES, &list, 0o644);
    Ok(())
}
