//! A TCP proxy for the scripts of `tests/vm`, whose mood a file tells at every moment.
//!
//! usage: `moody-proxy LISTEN UPSTREAM FILE`
//!
//! | mood | what comes from the server |
//! |---|---|
//! | `calm` | passes |
//! | `slow` | passes in small pieces, with pauses |
//! | `cut` | passes as far as an answer's head and a part of its body, then the connection breaks |
//! | `stall` | passes so far, then waits for another mood |

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// A piece in the `slow` mood, and what passes of an answer in the moods that break it, in bytes: more
/// than a head.
const PIECE: usize = 4096;

const PAUSE: Duration = Duration::from_millis(2);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, upstream, file] = arguments.as_slice() else {
        anyhow::bail!("usage: moody-proxy LISTEN UPSTREAM FILE");
    };
    let listener = TcpListener::bind(listen).with_context(|| format!("listen on {listen}"))?;
    for client in listener.incoming() {
        let (client, upstream, file) = (client?, upstream.clone(), PathBuf::from(file));
        thread::spawn(move || {
            if let Err(error) = join(client, &upstream, &file) {
                eprintln!("moody proxy: {error}");
            }
        });
    }
    Ok(())
}

fn join(client: TcpStream, upstream: &str, file: &Path) -> io::Result<()> {
    let server = TcpStream::connect(upstream)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        // An end that breaks is what the other is told of.
        drop(io::copy(&mut from, &mut to));
        drop(to.shutdown(Shutdown::Both));
    });
    drop(answers(&server, &client, file));
    for end in [server, client] {
        // It may be closed already, which is what is wanted.
        drop(end.shutdown(Shutdown::Both));
    }
    Ok(())
}

/// Passes what the server says, until the connection ends or the mood breaks it.
fn answers(mut server: &TcpStream, mut client: &TcpStream, file: &Path) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let len = server.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        let bytes = &buffer[..len];
        match mood(file)?.as_str() {
            "slow" => {
                for piece in bytes.chunks(PIECE) {
                    client.write_all(piece)?;
                    thread::sleep(PAUSE);
                }
            }
            "cut" if len > PIECE => {
                client.write_all(&bytes[..PIECE])?;
                return Ok(());
            }
            "stall" if len > PIECE => {
                client.write_all(&bytes[..PIECE])?;
                while mood(file)? == "stall" {
                    thread::sleep(10 * PAUSE);
                }
                client.write_all(&bytes[PIECE..])?;
            }
            _ => client.write_all(bytes)?,
        }
    }
}

fn mood(file: &Path) -> Result<String> {
    Ok(std::fs::read_to_string(file)?.trim().to_owned())
}
