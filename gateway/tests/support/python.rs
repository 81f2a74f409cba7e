//! A Python with the packages of `tests/python/requirements.txt`.
//!
//! The packages are installed once into the target folder. This needs `python3` with `venv` and access to the Python
//! package index.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::OnceLock,
};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python");

/// Runs one of the scripts in `tests/python` and returns its output.
///
/// # Errors
///
/// Returns the output of a script that fails.
pub async fn run_script<S: AsRef<str>>(name: &str, arguments: &[S]) -> Result<Vec<u8>, String> {
    let arguments: Vec<_> = arguments.iter().map(|argument| argument.as_ref().to_owned()).collect();
    let script = format!("{FOLDER}/{name}");
    let ran = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(python());
        command.arg(script).args(arguments).env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
        run(&mut command)
    });
    ran.await.unwrap()
}

fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        install().unwrap_or_else(|error| {
            panic!(
                "the Python packages could not be installed: {error}. It takes python3 with venv and pip (on Debian \
                 the packages python3 and python3-venv) and the Python package index"
            )
        })
    })
}

fn install() -> Result<PathBuf, String> {
    let requirements = format!("{FOLDER}/requirements.txt");
    let versions = fs::read_to_string(&requirements).unwrap().replace('\n', "-").replace("==", "-");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let folder = target.join(format!("python-{}", versions.trim_end_matches('-')));
    let python = folder.join("bin/python");
    if python.is_file() {
        return Ok(python);
    }
    // Another process may be installing, too. Rename the folder when it is complete.
    let work = target.join(format!("python-{}", process::id()));
    let _ = fs::remove_dir_all(&work);
    run(Command::new("python3").args(["-m", "venv"]).arg(&work))?;
    let pip =
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", &requirements];
    run(Command::new(work.join("bin/python")).args(pip))?;
    if fs::rename(&work, &folder).is_err() {
        let _ = fs::remove_dir_all(&work);
    }
    Ok(python)
}

fn run(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command.output().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = [output.stdout, output.stderr].concat();
    Err(String::from_utf8_lossy(&said).trim().to_owned())
}
